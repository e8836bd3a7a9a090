package blobstore

import (
	"crypto/md5"
	"encoding/base64"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// fakeAzure speaks as much of the protocol of Azure's block blobs as the SDK uses for us. It checks no signatures.
type fakeAzure struct {
	sync.Mutex
	blobs  map[string]fakeBlob
	blocks map[string][]byte // not committed
}

type fakeBlob struct {
	bytes       []byte
	contentType string
	changed     time.Time
}

func newFakeAzure() *fakeAzure {
	return &fakeAzure{blobs: map[string]fakeBlob{}, blocks: map[string][]byte{}}
}

func (f *fakeAzure) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // cut off: nothing of it is kept
	}
	f.Lock()
	defer f.Unlock()
	name, inContainer := strings.CutPrefix(r.URL.Path, "/someone/files/")
	q := r.URL.Query()
	blob, there := f.blobs[name]
	switch {
	case !inContainer && r.URL.Path != "/someone/files":
		fail(w, http.StatusNotFound, "ContainerNotFound")
	case q.Get("comp") == "list":
		f.list(w, q.Get("prefix"), q.Get("marker"))
	case r.Method == http.MethodPut && q.Get("comp") == "block":
		f.blocks[name+"\x00"+q.Get("blockid")] = body
		w.WriteHeader(http.StatusCreated)
	case r.Method == http.MethodPut && q.Get("comp") == "blocklist":
		f.commit(w, name, body, r.Header.Get("X-Ms-Blob-Content-Type"))
	case r.Method == http.MethodPut && r.Header.Get("X-Ms-Copy-Source") != "":
		source, err := url.Parse(r.Header.Get("X-Ms-Copy-Source"))
		if err != nil {
			fail(w, http.StatusBadRequest, "InvalidHeaderValue")
			return
		}
		_, from, _ := strings.Cut(source.Path, "/someone/files/")
		if _, there = f.blobs[from]; !there {
			fail(w, http.StatusNotFound, "BlobNotFound")
			return
		}
		f.blobs[name] = f.blobs[from]
		w.Header().Set("X-Ms-Copy-Status", "success")
		w.WriteHeader(http.StatusAccepted)
	case r.Method == http.MethodPut && r.Header.Get("X-Ms-Blob-Type") != "BlockBlob":
		fail(w, http.StatusBadRequest, "MissingRequiredHeader")
	case r.Method == http.MethodPut && there && r.Header.Get("If-None-Match") == "*":
		fail(w, http.StatusConflict, "BlobAlreadyExists")
	case r.Method == http.MethodPut:
		f.blobs[name] = fakeBlob{body, r.Header.Get("X-Ms-Blob-Content-Type"), time.Now()}
		w.WriteHeader(http.StatusCreated)
	case !there:
		fail(w, http.StatusNotFound, "BlobNotFound")
	case r.Method == http.MethodDelete:
		delete(f.blobs, name)
		w.WriteHeader(http.StatusAccepted)
	default:
		serveBlob(w, r, blob)
	}
}

func fail(w http.ResponseWriter, status int, code string) {
	w.Header().Set("X-Ms-Error-Code", code)
	w.WriteHeader(status)
}

func (f *fakeAzure) commit(w http.ResponseWriter, name string, body []byte, contentType string) {
	var list struct {
		Latest []string `xml:"Latest"`
	}
	if err := xml.Unmarshal(body, &list); err != nil {
		fail(w, http.StatusBadRequest, "InvalidXmlDocument")
		return
	}
	var all []byte
	for _, id := range list.Latest {
		block, ok := f.blocks[name+"\x00"+id]
		if !ok {
			fail(w, http.StatusBadRequest, "InvalidBlockList")
			return
		}
		all = append(all, block...)
		delete(f.blocks, name+"\x00"+id)
	}
	f.blobs[name] = fakeBlob{all, contentType, time.Now()}
	w.WriteHeader(http.StatusCreated)
}

func (f *fakeAzure) list(w http.ResponseWriter, prefix, marker string) {
	const page = 3 // so that there are several
	var names []string
	for name := range f.blobs {
		if strings.HasPrefix(name, prefix) && name >= marker {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	next := ""
	if len(names) > page {
		next, names = names[page], names[:page]
	}
	w.Header().Set("Content-Type", "application/xml")
	fmt.Fprint(w, `<?xml version="1.0" encoding="utf-8"?><EnumerationResults><Blobs>`)
	for _, name := range names {
		b := f.blobs[name]
		sum := md5.Sum(b.bytes)
		fmt.Fprintf(w, `<Blob><Name>%s</Name><Properties><Last-Modified>%s</Last-Modified><Content-Length>%d</Content-Length><Content-MD5>%s</Content-MD5><BlobType>BlockBlob</BlobType></Properties></Blob>`,
			name, b.changed.UTC().Format(http.TimeFormat), len(b.bytes), base64.StdEncoding.EncodeToString(sum[:]))
	}
	fmt.Fprintf(w, `</Blobs><NextMarker>%s</NextMarker></EnumerationResults>`, next)
}

func serveBlob(w http.ResponseWriter, r *http.Request, b fakeBlob) {
	part, status := b.bytes, http.StatusOK
	if span := r.Header.Get("X-Ms-Range"); span != "" {
		var from, to int
		if n, _ := fmt.Sscanf(span, "bytes=%d-%d", &from, &to); n < 2 || to >= len(b.bytes) {
			to = len(b.bytes) - 1
		}
		if from >= len(b.bytes) {
			fail(w, http.StatusRequestedRangeNotSatisfiable, "InvalidRange")
			return
		}
		part, status = b.bytes[from:to+1], http.StatusPartialContent
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to, len(b.bytes)))
	}
	w.Header().Set("Content-Type", b.contentType)
	w.Header().Set("Content-Length", fmt.Sprint(len(part)))
	w.Header().Set("Last-Modified", b.changed.UTC().Format(http.TimeFormat))
	w.Header().Set("X-Ms-Blob-Type", "BlockBlob")
	w.Header().Set("X-Ms-Creation-Time", b.changed.UTC().Format(http.TimeFormat))
	w.Header().Set("Etag", fmt.Sprintf(`"%d"`, b.changed.UnixNano()))
	w.WriteHeader(status)
	if r.Method == http.MethodGet {
		_, _ = w.Write(part)
	}
}
