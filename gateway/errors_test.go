package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/gofiber/fiber/v2/middleware/requestid"
)

var update = flag.Bool("update", false, "write generated and golden files anew")

// TestErrorsAreDocumented holds docs/errors.md equal to the table.
func TestErrorsAreDocumented(t *testing.T) {
	t.Parallel()
	const file, begin, end = "../docs/errors.md", "-update` -->\n", "<!-- end of table -->"
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(data), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", file)
	}
	tail, ok3 := replaceTable(tail, "<!-- outcomes -->\n", "<!-- end of outcomes -->", outcomeTable())
	if !ok3 {
		t.Fatalf("%s has no place for the table of outcomes", file)
	}
	want := head + begin + errorTable() + end + tail
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if string(data) != want {
		t.Errorf("%s is not what the table says; run: go test ./gateway -run TestErrorsAreDocumented -update", file)
	}
}

func replaceTable(text, begin, end, table string) (string, bool) {
	head, rest, ok := strings.Cut(text, begin)
	_, tail, ok2 := strings.Cut(rest, end)
	return head + begin + table + end + tail, ok && ok2
}

func outcomeTable() string {
	var b strings.Builder
	b.WriteString("| code | retryable | meaning | what the client does |\n|---|---|---|---|\n")
	for _, o := range pushOutcomes {
		retry := "no"
		if o.retryable {
			retry = "yes"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", o.code, retry, o.meaning, o.remedy)
	}
	return b.String()
}

func errorTable() string {
	var b strings.Builder
	b.WriteString("| code | HTTP | close | retryable | meaning | what the client does |\n|---|---|---|---|---|---|\n")
	number := func(n int) string {
		if n == 0 {
			return "–"
		}
		return fmt.Sprint(n)
	}
	for _, w := range wireErrors {
		retry := "no"
		if w.Retryable {
			retry = "yes"
		}
		fmt.Fprintf(&b, "| <a id=\"%s\"></a>`%s` | %s | %s | %s | %s | %s |\n", w.Code, w.Code, number(w.Status), number(w.Close), retry, w.Title, w.Remedy)
	}
	return b.String()
}

func TestErrorTable(t *testing.T) {
	t.Parallel()
	closes := map[int]Code{}
	for _, w := range wireErrors {
		if w.Code == "" || w.Title == "" || w.Remedy == "" || w.Status == 0 && w.Close == 0 {
			t.Errorf("%+v is incomplete", w)
		}
		if w.Status != 0 && http.StatusText(w.Status) == "" && w.Code != ChecksumMismatch { // 460 is tus's own
			t.Errorf("%s: no such status %d", w.Code, w.Status)
		}
		if other, twice := closes[w.Close]; twice && w.Close != 0 {
			t.Errorf("%s and %s share the close code %d", w.Code, other, w.Close)
		}
		closes[w.Close] = w.Code
		if (w.Status == 429 || w.Status == 503) && !w.Retryable {
			t.Errorf("%s: status %d is retryable", w.Code, w.Status)
		}
	}
	if FullResyncRequired.Wire().Close != 4410 || CursorExpired.Wire().Status != 410 {
		t.Error("the codes that the protocol fixes have moved")
	}
	if Code("nonsense").Wire().Code != Internal {
		t.Error("an unknown code must be internal")
	}
}

// problemApp answers /fail with err and /panic with a panic.
func problemApp(err error, log io.Writer) *fiber.App {
	app := fiber.New(fiber.Config{ErrorHandler: problemHandler(slog.New(slog.NewTextHandler(log, nil))), BodyLimit: 100})
	app.Use(requestid.New(), recoverPanic)
	app.Get("/fail", func(*fiber.Ctx) error { return err })
	app.Get("/panic", func(*fiber.Ctx) error { panic("secret in a panic") })
	return app
}

func TestWriteProblem(t *testing.T) {
	t.Parallel()
	const secret = "secret"
	for _, test := range []struct {
		name, method, path string
		err                error
		status             int
		code               Code
		detail             string
		header             map[string]string
		logged             bool
	}{
		{name: "problem", err: NewProblem(InvalidLimit, "limit is %d", 5000), status: 400, code: InvalidLimit, detail: "limit is 5000"},
		{name: "wrapped", err: fmt.Errorf("pull: %w", NewProblem(UnknownCollection, "x").Because(errors.New(secret))), status: 404, code: UnknownCollection, detail: "x"},
		{name: "any error", err: errors.New(secret), status: 500, code: Internal, logged: true},
		{name: "panic", path: "/panic", status: 500, code: Internal, logged: true},
		{name: "no route", path: "/nowhere", status: 404, code: NotFound},
		{name: "method", method: "DELETE", path: "/fail", status: 405, code: MethodNotAllowed, header: map[string]string{"Allow": "GET, HEAD"}},
		{name: "fiber error", err: fiber.NewError(418, secret), status: 400, code: InvalidRequest},
		{name: "fiber 500", err: fiber.NewError(502, secret), status: 500, code: Internal, logged: true},
		{name: "upgrade", err: fiber.ErrUpgradeRequired, status: 426, code: UpgradeRequired, header: map[string]string{"Upgrade": "websocket"}},
		{name: "deadline", err: fmt.Errorf("%s: %w", secret, context.DeadlineExceeded), status: 503, code: AnswerTimeout, logged: true},
		{name: "stopping", err: &Problem{Code: ShuttingDown}, status: 503, code: ShuttingDown, logged: true},
		{name: "rate", err: &Problem{Code: RateLimited, RetryAfter: 1100 * time.Millisecond}, status: 429, code: RateLimited, header: map[string]string{"Retry-After": "2"}},
		{name: "token", err: NewProblem(TokenExpired, ""), status: 401, code: TokenExpired, header: map[string]string{"Www-Authenticate": `Bearer error="invalid_token"`}},
		{name: "stream only", err: NewProblem(BinaryFrame, secret), status: 500, code: Internal, logged: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var log strings.Builder
			request := httptest.NewRequest(orDefault(test.method, "GET"), orDefault(test.path, "/fail"), nil)
			response, err := problemApp(test.err, &log).Test(request, -1)
			if err != nil {
				t.Fatal(err)
			}
			text, _ := io.ReadAll(response.Body)
			var body problemBody
			if err := json.Unmarshal(text, &body); err != nil {
				t.Fatalf("%s: %v", text, err)
			}
			if response.StatusCode != test.status || body.Status != test.status || body.Code != test.code || body.Detail != test.detail {
				t.Errorf("got %d %s", response.StatusCode, text)
			}
			if got := response.Header.Get("Content-Type"); got != "application/problem+json" {
				t.Errorf("content type %s", got)
			}
			if body.RequestID == "" || body.RequestID != response.Header.Get("X-Request-Id") || body.Errors == nil ||
				body.Title == "" || !strings.HasSuffix(body.Type, "#"+string(test.code)) {
				t.Errorf("got %s", text)
			}
			if strings.Contains(string(text), secret) {
				t.Errorf("internals leaked: %s", text)
			}
			for name, want := range test.header {
				if got := response.Header.Get(name); got != want {
					t.Errorf("%s: got %q, want %q", name, got, want)
				}
			}
			if response.Close != (test.code == ShuttingDown) {
				t.Errorf("the connection is closed: %t", response.Close)
			}
			if logged := log.Len() > 0; logged != test.logged {
				t.Errorf("logged: %q", log.String())
			}
		})
	}
}

// TestRetryAfterIsSpread: what concerns everybody sends them away for different times, none of them too long.
func TestRetryAfterIsSpread(t *testing.T) {
	t.Parallel()
	for base, most := range map[time.Duration]int{0: 3, 5 * time.Second: 15} {
		app, seen := problemApp(&Problem{Code: LogBehind, RetryAfter: base}, &strings.Builder{}), map[int]bool{}
		for range 60 {
			response, err := app.Test(httptest.NewRequest("GET", "/fail", nil), -1)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			n, err := strconv.Atoi(response.Header.Get("Retry-After"))
			if err != nil || n < int(base.Seconds()) || n < 1 || n > most {
				t.Fatalf("Retry-After %q for %s", response.Header.Get("Retry-After"), base)
			}
			seen[n] = true
		}
		if len(seen) < 2 {
			t.Errorf("everybody is to come back after %v s", seen)
		}
	}
}

func TestProblemFrame(t *testing.T) {
	t.Parallel()
	p := &Problem{Code: SecondSubscribe, Detail: "d", Errors: []FieldError{{"type", "again"}}, Cause: errors.New("secret")}
	got := string(p.frame("r1"))
	want := `{"type":"error","title":"The stream is subscribed already","detail":"d","code":"second_subscribe","retryable":false,"request_id":"r1","errors":[{"field":"type","detail":"again"}]}`
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if !strings.Contains(p.Error(), "secret") || !errors.Is(p, p.Cause) {
		t.Errorf("the log must see the cause: %v", p)
	}
}

func TestStatusCodes(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]Code{400: InvalidRequest, 401: InvalidToken, 403: Forbidden, 404: NotFound, 405: MethodNotAllowed, 408: RequestTimeout,
		413: RequestTooLarge, 414: RequestTooLarge, 431: RequestTooLarge, 422: InvalidRequest, 426: UpgradeRequired, 500: Internal, 502: Internal, 503: NotReady, 0: Internal} {
		if got := codeByStatus(status); got != want {
			t.Errorf("%d: got %s, want %s", status, got, want)
		}
	}
}
