package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const modulePath = "github.com/walgate/walgate"

// fences says which of our packages each package may import, and which libraries only it may.
var fences = map[string]struct{ ours, libraries []string }{
	".":                    {ours: []string{"blobstore", "changelog", "gateway", "internal/chaos", "internal/pgserver", "internal/ports", "internal/redisserver", "policies", "replication", "schema"}},
	"gateway":              {ours: []string{"blobstore", "changelog", "internal/failpoint", "policies", "schema"}, libraries: []string{"github.com/gofiber/", "github.com/fasthttp/", "github.com/golang-jwt/", "github.com/MicahParks/", "github.com/redis/"}},
	"replication":          {ours: []string{"changelog", "internal/failpoint", "policies", "schema"}, libraries: []string{"github.com/jackc/pglogrepl"}},
	"changelog":            {ours: []string{"internal/failpoint", "internal/migrate"}, libraries: []string{"github.com/redis/"}},
	"policies":             {ours: []string{"schema"}, libraries: []string{"github.com/google/cel-go"}},
	"schema":               {ours: []string{"internal/migrate"}},
	"blobstore":            {ours: []string{"internal/failpoint"}, libraries: []string{"gocloud.dev/", "github.com/aws/", "cloud.google.com/", "github.com/Azure/"}},
	"internal/badlink":     {},
	"internal/built":       {},
	"internal/chaos":       {ours: []string{"changelog", "internal/badlink", "internal/failpoint", "internal/pgserver", "internal/ports", "internal/redisserver", "policies", "schema"}},
	"internal/failpoint":   {},
	"internal/migrate":     {},
	"internal/pgserver":    {ours: []string{"internal/ports"}},
	"internal/ports":       {},
	"internal/redisserver": {ours: []string{"internal/ports"}},
	"bench":                {ours: []string{"changelog", "gateway", "internal/pgserver", "internal/ports", "internal/redisserver", "policies", "replication", "schema"}},
}

// demoFiles of package main drive a WebSocket as a client does.
var demoFiles = []string{"demo_client.go"}

// TestHouse holds the rules that keep the tree readable: imports run one way, libraries stay behind their fences,
// packages say what they are, and files stay small.
func TestHouse(t *testing.T) {
	t.Parallel()
	documented := map[string]bool{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "node_modules" || d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") && path != ".") {
			return filepath.SkipDir
		}
		if strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
			checkFile(t, path, documented)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range fences {
		if has, ok := documented[pkg]; ok && !has {
			t.Errorf("package %s has no doc comment", pkg)
		}
	}
}

func checkFile(t *testing.T, path string, documented map[string]bool) {
	pkg := filepath.ToSlash(filepath.Dir(path))
	fence, known := fences[pkg]
	if !known {
		t.Errorf("%s: package %s is not in the plan of the house (house_test.go)", path, pkg)
		return
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(text), "\n"); n > 500 {
		t.Errorf("%s has %d lines: split it by role", path, n)
	}
	f, err := parser.ParseFile(token.NewFileSet(), path, text, parser.ImportsOnly|parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	documented[pkg] = documented[pkg] || f.Doc != nil
	for _, imp := range f.Imports {
		name := strings.Trim(imp.Path.Value, `"`)
		if ours, ok := strings.CutPrefix(name, modulePath+"/"); ok && !slices.Contains(fence.ours, ours) {
			t.Errorf("%s imports %s: imports run one way only", path, ours)
		}
		for owner, other := range fences {
			if owner == pkg || pkg == "bench" || pkg == "internal/chaos" || slices.Contains(demoFiles, path) {
				continue
			}
			for _, library := range other.libraries {
				if strings.HasPrefix(name, library) && !slices.Contains(fence.libraries, library) {
					t.Errorf("%s imports %s, which only %s may", path, name, owner)
				}
			}
		}
	}
}
