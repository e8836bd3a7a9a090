package failpoint

import (
	"os/exec"
	"regexp"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

//go:noinline
func stepWithPoint(n int) int { Here(Received); return n + 1 }

//go:noinline
func stepWithout(n int) int { return n + 1 }

var steps = []func(int) int{stepWithPoint, stepWithout}

// TestHereCompilesToNothing holds a function with a point against the same one without, as the compiler lists them.
func TestHereCompilesToNothing(t *testing.T) {
	t.Parallel()
	for _, step := range steps {
		if step(1) != 2 {
			t.Error("a step did something else")
		}
	}
	sizes := func(tags string) (with, without string) {
		out, err := exec.Command("go", "test", "-c", "-o", "/dev/null", "-tags="+tags, "-gcflags=-S", ".").CombinedOutput()
		if err != nil {
			t.Fatalf("go test -c: %v\n%s", err, out)
		}
		size := func(function string) string {
			m := regexp.MustCompile(function + ` STEXT.* size=(\d+) `).FindSubmatch(out)
			if m == nil {
				t.Fatalf("the listing lacks %s", function)
			}
			return string(m[1])
		}
		return size("stepWithPoint"), size("stepWithout")
	}
	if with, without := sizes(""); with != without {
		t.Errorf("a function with a point has %s bytes of code, without it %s", with, without)
	}
	if with, without := sizes("failpoints"); with == without {
		t.Errorf("built with the tag, a point still adds nothing to %s bytes", with)
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, p := range All() {
		if p.String() == "" || seen[p.String()] {
			t.Errorf("point %d has the name %q", p, p)
		}
		seen[p.String()] = true
	}
}
