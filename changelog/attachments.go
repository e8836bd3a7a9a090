package changelog

import "time"

// Reference says that a document names an attachment in a scope, or no longer does. What counts is the last one of each
// (attachment, scope, document) in the order of the log.
type Reference struct {
	Attachment [16]byte // policies.AttachmentKey
	Scope      [16]byte
	Document   [16]byte // policies.DocumentKey, never zero
	Version    Version
	Fill       int32 // the collection's newest fill; without meaning where Removed
	Removed    bool
}

// ReferenceBytes is what a Reference counts for in Piece.Size.
const ReferenceBytes = 72

// What a FileEvent says of an attachment's bytes.
const (
	FileUploaded byte = 'u'
	FileDeleted  byte = 'd'
	FileMissing  byte = 'm' // they are gone from the store, and nobody asked for that
	FileReturned byte = 'r' // they are back, or were deleted and not yet gone when a row named them again: nobody gets to read them who couldn't before
)

// FileEvent is one row of walgate.attachments in the source, or, of a fill of the bytes, of walgate.files there.
type FileEvent struct {
	ID           int64 // rises for each attachment; one that isn't above what the log holds is ignored
	AttachmentID string
	Key          [16]byte // policies.AttachmentKey of AttachmentID
	Event        byte
	Size         int64
	ContentType  string
	SHA256       []byte
	Home         [16]byte   // the scope that holds it as long as no row names it
	Scopes       [][16]byte // where the uploader may write: others that name it are withheld; nil: all
	CreatedAt    time.Time
	Version      Version
}

// Bytes returns what e counts for in Piece.Size.
func (e *FileEvent) Bytes() int {
	return 200 + len(e.AttachmentID) + len(e.ContentType) + len(e.SHA256) + 16*len(e.Scopes)
}

// FillStep is a step of looking through what existed before the log knew of attachments. Steps of a fill that isn't its
// collection's newest are ignored.
type FillStep struct {
	Fill       int32
	Collection int32 // 0: of the bytes, whose rows come as Piece.Files
	Version    Version
	Start      bool // the fill begins: it is its collection's newest from here on
	Estimate   int64
	Rows       []FillRow
	Looked     int64    // rows looked at in this step; 0: as many as Rows
	Position   []string // key of the last row; nil: unchanged
	From       Version  // rows that the log holds changes of from here on are newer there, and skipped
	Done       bool
	// SweepFrom and SweepTo are heap blocks of the references (of the bytes, where Collection is 0), from and before, in
	// which what the fills Stale wrote is removed. See Log.SweepBlocks.
	SweepFrom, SweepTo int64
	Stale              []int32
	Swept              bool // nothing of Stale is left: they are forgotten, which may name Fill itself
}

// FillRow is one document with what it refers to.
type FillRow struct {
	DocID      []byte
	Document   [16]byte
	References []Reference
	Version    Version // of the operations that come of it
}

// Bytes returns what s counts for in Piece.Size.
func (s *FillStep) Bytes() int {
	n := 200
	for i := range s.Rows {
		n += 100 + len(s.Rows[i].DocID) + ReferenceBytes*len(s.Rows[i].References)
	}
	return n
}

// Operation is what holders of a scope are to do about an attachment.
type Operation struct {
	Version     Version
	Attachment  [16]byte
	Scope       [16]byte // of Log.Operations: one of those asked for
	ID          string
	Delete      bool // else download
	Missing     bool // neither: the store lost the bytes. Only in announcements, and nobody is told
	Size        int64
	ContentType string
	SHA256      []byte
	CreatedAt   time.Time
}

// Fill is how far a fill has come.
type Fill struct {
	Fill, Collection int32
	Version          Version
	Position         []string
	Rows, Estimate   int64
	Done, Swept      bool
	StartedAt        time.Time
}

// OperationsRequest asks for the operations of a caller's scopes.
type OperationsRequest struct {
	Scopes [][16]byte
	Since  Version // exclusive
	Until  Version // inclusive; 0: the newest
	Limit  int     // at least 1; exceeded where one version holds more
}

// OperationsPage is the latest operation of each attachment over the scopes asked for, at its latest version and in
// version order. It is a download where any of the scopes holds the attachment.
type OperationsPage struct {
	Head       Head
	Floor      Version // deletes below it may be missing
	Operations []Operation
	Last       Version // everything up to here is told; above Since whenever More
	More       bool
	Filled     []int32 // collections of which some fill is done; 0: the bytes
}

// Held is how an attachment stands to scopes.
type Held struct {
	Any      bool // a row names it
	Within   bool // one in the scopes
	Outside  bool // one in other scopes
	Readable bool // its bytes are there for these scopes: a row names it in one that isn't withheld, or none does and one is its uploader's
	Known    bool // or would be if they were there, or were there for these scopes since it was uploaded: who asks may name it in rows
}

// ListRequest asks for the attachments that scopes hold.
type ListRequest struct {
	Scopes      [][16]byte
	Order       string // date, -date, id, -id, size or -size
	After       string // List.Next of the page before
	Limit       int
	ContentType string // a prefix
	IDPrefix    string
	CountOnly   bool
}

// List is a page of attachments, each as a download.
type List struct {
	Attachments []Operation
	Next        string // empty: there are no more
	Count       int64  // of CountOnly
}
