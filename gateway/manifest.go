package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/gofiber/fiber/v2"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/schema"
)

// The manifest tells a client which files to download and which to delete since a version: of each attachment the latest
// operation over all the caller's scopes. Its positions are versions as integers, on the same line as those of rows, and the
// client keeps them apart from its position in the rows.

const (
	manifestDefault = 1000
	manifestMost    = 10_000
	// operationMemory is what one operation takes in memory and in an answer, about.
	operationMemory = 1 << 10
)

// manifestRequest is the body of POST /attachments/manifest.
type manifestRequest struct {
	clientID string
	since    changelog.Version
	limit    int
}

// manifestPage is what is answered.
type manifestPage struct {
	operations []changelog.Operation
	current    changelog.Version
	more       bool
	position   changelog.Version // where the log stood
	floor      changelog.Version // of deletions
}

var sincePattern = regexp.MustCompile(`^(0|[1-9][0-9]*)$`)

// parseManifest reads a body; members that it doesn't know are let through, for clients of other servers of this kind.
func parseManifest(body []byte) (r manifestRequest, err error) {
	var members map[string]json.RawMessage
	if !utf8.Valid(body) {
		return r, &Problem{Code: InvalidRequest, Detail: "the body is not UTF-8"}
	}
	if err := json.Unmarshal(body, &members); err != nil || members == nil {
		detail := "no object"
		if err != nil {
			detail = jsonFault(err)
		}
		return r, &Problem{Code: InvalidRequest, Detail: "the body is no JSON object", Errors: []FieldError{{"", detail}}}
	}
	var faults []FieldError
	read := func(name string, why string) {
		if _, there := members[name]; !there {
			why = "is missing"
		}
		if why != "" {
			faults = append(faults, FieldError{name, why})
		}
	}
	read("client_id", r.readClient(members["client_id"]))
	read("since_version", r.readSince(members["since_version"]))
	r.limit = manifestDefault
	if limit, there := members["limit"]; there {
		read("limit", r.readLimit(limit))
	}
	if len(faults) > 0 {
		err = &Problem{Code: InvalidRequest, Detail: "the body lacks what a manifest needs, or has it in another form", Errors: faults}
	}
	return r, err
}

func (r *manifestRequest) readClient(value json.RawMessage) string {
	if len(value) == 0 || value[0] != '"' || json.Unmarshal(value, &r.clientID) != nil {
		return "must be a text that names the client"
	}
	if r.clientID == "" {
		return "must not be empty"
	}
	return clientFault(r.clientID)
}

func (r *manifestRequest) readSince(value json.RawMessage) string {
	if !sincePattern.Match(value) {
		return "must be a whole number from 0 on: the current_version of the last manifest, or 0"
	}
	v, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil {
		v = math.MaxInt64 // above all versions
	}
	r.since = changelog.Version(v)
	return ""
}

func (r *manifestRequest) readLimit(value json.RawMessage) string {
	n, err := strconv.Atoi(string(value))
	if err != nil || n < 1 || n > manifestMost || !sincePattern.Match(value) {
		return fmt.Sprintf("must be a whole number from 1 to %d", manifestMost)
	}
	r.limit = n
	return ""
}

// manifest answers POST /attachments/manifest.
func (g *Gateway) manifest(c *fiber.Ctx) error {
	began := time.Now()
	body, err := readSmallBody(c)
	if err != nil {
		return err
	}
	r, err := parseManifest(body)
	if err != nil {
		return err
	}
	id := identityOf(c)
	if err := g.checkClient(id, r.clientID); err != nil {
		return err
	}
	f, err := g.feedFor(id, nil)
	if err != nil {
		return err
	}
	files := newFileScopes(f.set, f.caller, r.clientID)
	ctx, cancel := context.WithTimeout(g.working, readMost)
	defer cancel()
	room, err := g.memory.acquire(ctx, r.limit*operationMemory)
	if err != nil {
		return g.logProblem(err)
	}
	p, again, err := g.manifestPage(ctx, client{id.Subject, r.clientID}, files, r)
	if err != nil {
		room.release()
		return err
	}
	c.Set(fiber.HeaderContentType, fiber.MIMEApplicationJSON)
	c.Set(fiber.HeaderCacheControl, "no-store")
	if again != "" {
		room.release()
		g.metrics.manifests.WithLabelValues("resync_required").Inc()
		return c.SendString(`{"full_resync_required":true,"reason":"` + again + `"}`)
	}
	answer := g.appendManifest(nil, p)
	room.shrink(len(answer))
	g.metrics.manifestSeconds.Observe(time.Since(began).Seconds())
	sendHeld(c, answer, room)
	return nil
}

// operationText is about how long an operation is, but for the public URL.
const operationText = 400

// appendManifest writes the answer and counts what it says.
func (g *Gateway) appendManifest(b []byte, p *manifestPage) []byte {
	signer := g.newURLSigner(g.urlExpiry(time.Now()).Unix())
	var link []byte
	b = slices.Grow(b, 100+len(p.operations)*(operationText+len(signer.prefix)))
	var size int64
	deletes := 0
	b = append(b, `{"current_version":`...)
	b = strconv.AppendInt(b, int64(p.current), 10)
	b = append(b, `,"operations":[`...)
	for i := range p.operations {
		o := &p.operations[i]
		if i > 0 {
			b = append(b, ',')
		}
		if o.Delete {
			deletes++
			b = append(b, `{"operation":"delete","attachment_id":`...)
		} else {
			size += o.Size
			b = append(b, `{"operation":"download","attachment_id":`...)
		}
		b = schema.AppendString(b, []byte(o.ID))
		if !o.Delete {
			link = signer.appendURL(link[:0], o.ID, o.SHA256)
			b = appendContent(b, o, link)
		}
		b = append(b, `,"version":`...)
		b = strconv.AppendInt(b, int64(o.Version), 10)
		b = append(b, '}')
	}
	downloads := len(p.operations) - deletes
	b = append(b, `],"total_download_size":`...)
	b = strconv.AppendInt(b, size, 10)
	b = append(b, `,"operation_count":{"download":`...)
	b = strconv.AppendInt(b, int64(downloads), 10)
	b = append(b, `,"delete":`...)
	b = strconv.AppendInt(b, int64(deletes), 10)
	b = append(b, `},"has_more":`...)
	b = strconv.AppendBool(b, p.more)
	g.metrics.manifestOperations.WithLabelValues("download").Add(float64(downloads))
	g.metrics.manifestOperations.WithLabelValues("delete").Add(float64(deletes))
	return append(b, '}')
}

// operations reads a page of operations once a reader's place is free.
func (g *Gateway) operations(ctx context.Context, r changelog.OperationsRequest) (*changelog.OperationsPage, error) {
	release, err := g.admitReader(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, readMost)
	defer cancel()
	p, err := g.o.Log.Operations(ctx, r)
	return p, g.logProblem(err)
}

// newest reads how far the log is, once a reader's place is free.
func (g *Gateway) newest(ctx context.Context) (changelog.Version, error) {
	release, err := g.admitReader(ctx)
	if err != nil {
		return 0, err
	}
	defer release()
	v, err := g.o.Log.Newest(ctx)
	return v, g.logProblem(err)
}
