package schema

// Kind says how the text of a type becomes JSON.
type Kind uint8

// The kinds. A domain has the kind of its base type; a type the codec doesn't know has KindText.
const (
	KindText        Kind = iota // a JSON string of the text as it is
	KindBool                    // true or false
	KindNumber                  // int2, int4, float4, float8: the digits as they are; NaN and infinities as strings
	KindBigNumber               // int8, numeric: as KindNumber, or as a string where the collection is lossless
	KindJSON                    // json, jsonb: the text as it is, raw line breaks made spaces
	KindDate                    // date
	KindTimestamp               // timestamp: "T" between date and time
	KindTimestampTZ             // timestamptz: as KindTimestamp, offset with minutes
	KindArray                   // nested JSON arrays
	KindVector                  // int2vector, oidvector: space-separated text, a JSON array
	KindComposite               // a JSON object of the fields
	KindHstore                  // a JSON object of strings and nulls
)

// Type is one PostgreSQL type as the codec needs it. Types are immutable and shared.
type Type struct {
	OID    uint32
	Name   string // as format_type prints it, for SQL casts and messages
	Kind   Kind
	Base   *Type    // the base type of a domain, nil otherwise
	Elem   *Type    // element type of KindArray and KindVector
	Delim  byte     // delimiter of array text: ',' or, for box, ';'
	Fields []Field  // of KindComposite, in attribute order, dropped ones left out
	Labels []string // of an enum, in order; nil for other types
}

// Field is one attribute of a composite type.
type Field struct {
	Name string
	Type *Type
}

// Underlying returns the type behind any chain of domains, or t itself.
func (t *Type) Underlying() *Type {
	for t.Base != nil {
		t = t.Base
	}
	return t
}

// Row holds the PostgreSQL text of one row's columns in the order of the layout it was read with; nil is NULL. The
// bytes belong to the reader that made the row and are valid until its next row.
type Row [][]byte

// Column is one column of a table.
type Column struct {
	Name       string
	Num        int16 // attnum in the root table; stable, never used again after a drop
	Type       *Type
	TypMod     int32
	NotNull    bool
	HasDefault bool // has a default or, for a column added later, a stored missing value
	Generated  bool // stored or virtual: left out of documents on every path
	Virtual    bool // generated and virtual (PostgreSQL 18)
	Toastable  bool // its value may be stored out of line
	// Deterministic is false where the column's collation calls different bytes equal.
	Deterministic bool
	// AlwaysAssigned says GENERATED ALWAYS AS IDENTITY: no client can give it a value.
	AlwaysAssigned bool
	declared       string // the type as declared, a domain's base in its place, with its modifier; "" where the name alone says it
	stamp          string // changes whenever the column's definition is written anew
}

// Table is one synced or syncable relation. For a partitioned table it describes the root.
type Table struct {
	OID         uint32
	Schema      string
	Name        string
	Kind        byte     // pg_class.relkind: 'r' table, 'p' partitioned, 'v' view, 'm' materialised view, 'f' foreign
	Persistence byte     // pg_class.relpersistence: 'p' permanent, 'u' unlogged, 't' temporary
	Columns     []Column // in attribute order, dropped ones left out
	Key         []int    // positions in Columns of the primary key, in key order; empty: no key
	// KeyDeferrable says that the primary key is checked at the end of the statement or later, not row by row.
	KeyDeferrable bool
	Identity      byte   // pg_class.relreplident: 'd' default, 'f' full, 'i' index, 'n' nothing
	RowsHidden    bool   // row-level security hides rows from the role that asked
	Readable      bool   // the role that asked may select from it
	Published     bool   // itself or, for a partitioned table, as root in walgate's publication
	Filtered      bool   // published with a row filter
	Listed        bool   // published with a column list
	Leaves        []Leaf // partitions that hold rows, of a partitioned table
	Partition     bool   // is itself a partition of another table
	ForeignKeys   []ForeignKey
	keyNames      []keyName // of the primary keys of the table and its partitions
	keyEquals     []string  // the operators that compare the key's columns
	joined        string    // names this stay in the publication: another one follows a gap
	file          uint32    // pg_class.relfilenode: another one was written from scratch
	width         int16     // pg_class.relnatts: columns that ever were
}

// Leaf is one partition that holds rows.
type Leaf struct {
	OID    uint32
	Schema string
	Name   string
	Kind   byte // pg_class.relkind: 'r' or 'f'
	// Persistence is pg_class.relpersistence: 'p' permanent, 'u' unlogged.
	Persistence byte
	Identity    byte
	link        string // names this attachment to the root: another one follows a gap
	file        uint32
}

// Ordinary returns the columns that a row holds as read and written by a push: all but generated ones, in the table's order.
func (t *Table) Ordinary() []Column {
	cols := make([]Column, 0, len(t.Columns))
	for _, c := range t.Columns {
		if !c.Generated {
			cols = append(cols, c)
		}
	}
	return cols
}

// Column returns the position of a column in t.Columns, or -1.
func (t *Table) Column(name string) int {
	for i := range t.Columns {
		if t.Columns[i].Name == name {
			return i
		}
	}
	return -1
}

// String returns schema.name, unquoted, for messages.
func (t *Table) String() string { return t.Schema + "." + t.Name }
