package pgserver

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestFindReturnsNewestFirstWithoutDoubles(t *testing.T) {
	t.Parallel()
	installs, err := Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.IsSortedFunc(installs, func(a, b Install) int { return b.Major - a.Major }) {
		t.Errorf("not newest first: %v", installs)
	}
	seen := map[string]bool{}
	for _, install := range installs {
		if seen[install.Bin] {
			t.Errorf("%s is listed twice", install.Bin)
		}
		seen[install.Bin] = true
	}
}

func TestPickNamesWhatThereIs(t *testing.T) {
	t.Parallel()
	installs := []Install{{Major: 18}, {Major: 15}}
	if got, err := pick(installs, 0); err != nil || got.Major != 18 {
		t.Errorf("pick(0) = %v, %v; want the newest", got, err)
	}
	if got, err := pick(installs, 15); err != nil || got.Major != 15 {
		t.Errorf("pick(15) = %v, %v", got, err)
	}
	if _, err := pick(installs, 14); err == nil || !strings.Contains(err.Error(), "18, 15") {
		t.Errorf("pick(14) error %v, want one that lists what is there", err)
	}
}

// npmPackage lays out a package as npm unpacks it: no symbolic links, only the list of them.
func npmPackage(t *testing.T, list string) (native string) {
	t.Helper()
	native = filepath.Join(t.TempDir(), "native")
	for path, text := range map[string]string{
		"bin/postgres": "binary", "bin/initdb": "binary", "share/postgres.bki": "catalog", "lib/libpq.so.5.18": "library",
		symlinkList: list,
	} {
		path = filepath.Join(native, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return native
}

const linkList = `[{"source":"native/lib/libpq.so.5.18","target":"native/lib/libpq.so.5"}]`

func TestMissingLinksAreMade(t *testing.T) {
	t.Parallel()
	native := npmPackage(t, linkList)
	links, err := missingLinks(native)
	if err != nil || len(links) != 1 {
		t.Fatalf("missing links %v, %v; want one", links, err)
	}
	if err := makeLinks(native, links); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(filepath.Join(native, "lib", "libpq.so.5")); err != nil || string(text) != "library" {
		t.Errorf("through the link: %q, %v", text, err)
	}
	if links, err = missingLinks(native); err != nil || len(links) != 0 {
		t.Errorf("still missing after making them: %v, %v", links, err)
	}
}

func TestUnusablePackageIsCopied(t *testing.T) {
	t.Parallel()
	native := npmPackage(t, linkList)
	links, err := missingLinks(native)
	if err != nil {
		t.Fatal(err)
	}
	bin, err := copiedLayout(native, links)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(filepath.Dir(filepath.Dir(bin))) })
	if text, err := os.ReadFile(filepath.Join(bin, "..", "lib", "libpq.so.5")); err != nil || string(text) != "library" {
		t.Errorf("through the copy's link: %q, %v", text, err)
	}
	if _, err := os.Lstat(filepath.Join(native, "lib", "libpq.so.5")); err == nil {
		t.Error("the original was written to")
	}
	if again, err := copiedLayout(native, links); err != nil || again != bin {
		t.Errorf("second call: %s, %v; want the same copy %s", again, err, bin)
	}
}

func TestLinksOutsideThePackageAreRefused(t *testing.T) {
	t.Parallel()
	for _, list := range []string{
		`[{"source":"native/lib/a","target":"../../etc/passwd"}]`,
		`[{"source":"/etc/passwd","target":"native/lib/a"}]`,
		`not json`,
	} {
		if _, err := missingLinks(npmPackage(t, list)); err == nil {
			t.Errorf("list %s was accepted", list)
		}
	}
}
