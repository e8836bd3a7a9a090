package gateway

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
)

// document is what is served, parsed; a copy of its own validated.
var document = sync.OnceValues(func() (*openapi3.T, error) {
	doc, err := openapi3.NewLoader().LoadFromData(openAPIDocument)
	if err == nil {
		err = doc.Validate(openapi3.NewLoader().Context)
	}
	return doc, err
})

func openAPIDoc(t testing.TB) *openapi3.T {
	t.Helper()
	doc, err := document()
	ok(t, err)
	return doc
}

// TestOpenAPIDocument holds the document against the routes and the table of errors.
func TestOpenAPIDocument(t *testing.T) {
	t.Parallel()
	doc := openAPIDoc(t)
	g := New(Options{RequestsPerSecond: 1, Burst: 1})
	var routes []string
	for _, r := range g.app.GetRoutes(true) {
		if r.Method == http.MethodGet || r.Method == http.MethodPost {
			routes = append(routes, routeParameter.ReplaceAllString(r.Path, "{$1}"))
		}
	}
	slices.Sort(routes)
	routes = slices.Compact(routes)
	if documented := doc.Paths.InMatchingOrder(); len(documented) != len(routes) {
		t.Errorf("served %v, documented %v", routes, documented)
	}
	for _, path := range routes {
		if doc.Paths.Value(path) == nil {
			t.Errorf("%s is not documented", path)
		}
	}
	var codes []string
	for _, v := range doc.Components.Schemas["ErrorCode"].Value.Enum {
		codes = append(codes, v.(string))
	}
	for i := range wireErrors {
		if !slices.Contains(codes, string(wireErrors[i].Code)) {
			t.Errorf("the code %s is not documented", wireErrors[i].Code)
		}
	}
	var outcomes []string
	for _, v := range doc.Components.Schemas["OutcomeCode"].Value.Enum {
		outcomes = append(outcomes, v.(string))
	}
	if want := slices.Collect(func(yield func(string) bool) {
		for _, o := range pushOutcomes {
			if !yield(o.code) {
				return
			}
		}
	}); !slices.Equal(outcomes, want) {
		t.Errorf("documented are the outcomes %v, the table has %v", outcomes, want)
	}
	if len(codes) != len(wireErrors) {
		t.Errorf("%d codes are documented, the table has %d", len(codes), len(wireErrors))
	}
}

// routeParameter is a parameter in a route's path.
var routeParameter = regexp.MustCompile(`:([a-z_]+)`)

// documentedPath finds what the document says of a request's path.
func documentedPath(doc *openapi3.T, method, path string) *openapi3.PathItem {
	if item := doc.Paths.Value(path); item != nil && item.GetOperation(method) != nil {
		return item
	}
	parts := strings.Split(path, "/")
	for template, item := range doc.Paths.Map() {
		if slices.EqualFunc(strings.Split(template, "/"), parts, func(want, has string) bool { return want == has || strings.HasPrefix(want, "{") }) && (strings.Contains(template, "{") || item.GetOperation(method) != nil) {
			return item
		}
	}
	return nil
}

// checkAnswer holds an answer against the document: status, headers and body. What no path of the document names must be
// a problem.
func checkAnswer(t testing.TB, req *http.Request, a *answer) {
	t.Helper()
	if bytes.Contains(a.body, []byte(`"changes":null`)) || bytes.Contains(a.body, []byte(`"errors":null`)) || bytes.Contains(a.body, []byte(`"collections":null`)) {
		t.Errorf("an empty list is null: %s", a.body)
	}
	doc := openAPIDoc(t)
	path := documentedPath(doc, req.Method, req.URL.Path)
	if path == nil || path.GetOperation(req.Method) == nil {
		if a.status < 300 && req.Method != http.MethodHead && req.Method != http.MethodOptions {
			t.Errorf("%s %s is served but not documented", req.Method, req.URL.Path)
		}
		if a.status >= 400 && len(a.body) > 0 {
			checkSchema(t, "Problem", a.body)
		}
		return
	}
	if req.URL.Path == "/sync/full" && a.status == http.StatusOK {
		for line := range strings.Lines(string(decompress(t, a))) {
			checkSchema(t, "FullLine", []byte(line))
		}
	}
	in := &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{Request: req,
			Route: &routers.Route{Spec: doc, Path: req.URL.Path, PathItem: path, Method: req.Method, Operation: path.GetOperation(req.Method)}},
		Status: a.status, Header: a.header, Body: io.NopCloser(bytes.NewReader(a.body)),
		Options: &openapi3filter.Options{IncludeResponseStatus: true, ExcludeResponseBody: req.URL.Path == "/sync/full" && a.status == http.StatusOK || path.Get != nil && path.Get.OperationID == "getAttachment" && a.status < 300 && req.Method != http.MethodPut},
	}
	if err := openapi3filter.ValidateResponse(req.Context(), in); err != nil {
		t.Errorf("%s %s answered %d, not as documented: %v\n%.500s", req.Method, req.URL.Path, a.status, err, a.body)
	}
}

// checkFrame holds a frame of the stream against the document.
func checkFrame(t testing.TB, data []byte) {
	t.Helper()
	checkSchema(t, "ServerFrame", data)
}

func checkSchema(t testing.TB, name string, data []byte) {
	t.Helper()
	var v any
	if err := json.Unmarshal(data, &v); err != nil {
		t.Errorf("not JSON: %v: %.500s", err, data)
		return
	}
	if err := openAPIDoc(t).Components.Schemas[name].Value.VisitJSON(v, openapi3.VisitAsResponse()); err != nil {
		t.Errorf("not a %s: %v\n%.500s", name, err, data)
	}
}
