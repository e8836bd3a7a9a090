package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/http"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/gofiber/fiber/v2/utils"
)

// problemTypeBase is what a code is appended to for the member type: the place where the code is explained.
const problemTypeBase = "https://github.com/walgate/walgate/blob/main/docs/errors.md#"

// defaultRetryAfter is how long a client is asked to wait where nothing better is known.
const defaultRetryAfter = time.Second

// Problem is an error that clients may see, in the form of RFC 9457. Only Detail and Errors reach them; Cause is for
// the log.
type Problem struct {
	Code       Code
	Detail     string
	Errors     []FieldError
	RetryAfter time.Duration // 0: a default where the status asks for one
	Cause      error
}

// FieldError is what is wrong with one parameter or member of a request.
type FieldError struct {
	Field  string `json:"field"`
	Detail string `json:"detail"`
}

// NewProblem makes a problem with a formatted detail, which clients see.
func NewProblem(code Code, format string, args ...any) *Problem {
	return &Problem{Code: code, Detail: fmt.Sprintf(format, args...)}
}

// Because attaches the cause, which only the log sees.
func (p *Problem) Because(cause error) *Problem {
	p.Cause = cause
	return p
}

// Error is the text for the log.
func (p *Problem) Error() string {
	text := string(p.Code)
	if p.Detail != "" {
		text += ": " + p.Detail
	}
	if p.Cause != nil {
		text += ": " + p.Cause.Error()
	}
	return text
}

// Unwrap returns the cause.
func (p *Problem) Unwrap() error { return p.Cause }

// problemBody is a problem as JSON; the order of fields is that of RFC 9457.
type problemBody struct {
	Type      string       `json:"type"`
	Title     string       `json:"title"`
	Status    int          `json:"status,omitempty"`
	Detail    string       `json:"detail,omitempty"`
	Code      Code         `json:"code"`
	Retryable bool         `json:"retryable"`
	RequestID string       `json:"request_id,omitempty"`
	Errors    []FieldError `json:"errors"`
}

func (p *Problem) body(requestID string) problemBody {
	w := p.Code.Wire()
	body := problemBody{
		Type:      problemTypeBase + string(w.Code),
		Title:     w.Title,
		Status:    w.Status,
		Detail:    p.Detail,
		Code:      w.Code,
		Retryable: w.Retryable,
		RequestID: requestID,
		Errors:    p.Errors,
	}
	if body.Errors == nil {
		body.Errors = []FieldError{}
	}
	return body
}

// frame is the problem as a frame of the stream: its type is "error".
func (p *Problem) frame(requestID string) []byte {
	body := p.body(requestID)
	body.Type = "error"
	return mustJSON(body)
}

func mustJSON(body problemBody) []byte {
	text, err := json.Marshal(body) // strings, a number and a boolean: can't fail
	if err != nil {
		panic(err)
	}
	return text
}

// asProblem turns any error into what clients may know of it.
func asProblem(err error) *Problem {
	var p *Problem
	var f *fiber.Error
	switch {
	case errors.As(err, &p):
		return p
	case errors.As(err, &f):
		code := codeByStatus(f.Code)
		return &Problem{Code: code, Cause: err}
	case errors.Is(err, context.DeadlineExceeded):
		return &Problem{Code: AnswerTimeout, Cause: err}
	default:
		return &Problem{Code: Internal, Cause: err}
	}
}

// writeProblem answers a request with an error. Whatever is no Problem is told as internal, without its text.
func writeProblem(c *fiber.Ctx, err error) error {
	p := asProblem(err)
	w := p.Code.Wire()
	status := w.Status
	if status == 0 { // of the stream only, so no request should end in it
		p, w = &Problem{Code: Internal, Cause: err}, Internal.Wire()
		status = w.Status
	}
	c.Set(fiber.HeaderCacheControl, "no-store")
	switch status {
	case http.StatusUnauthorized:
		c.Set(fiber.HeaderWWWAuthenticate, `Bearer error="invalid_token"`)
	case http.StatusUpgradeRequired:
		if p.Code == UpgradeRequired {
			c.Set(fiber.HeaderUpgrade, "websocket")
		}
	case http.StatusTooManyRequests:
		c.Set(fiber.HeaderRetryAfter, strconv.Itoa(retryAfterSeconds(p.RetryAfter)))
	case http.StatusServiceUnavailable:
		c.Set(fiber.HeaderRetryAfter, strconv.Itoa(retryAfterSeconds(spreadRetry(p.RetryAfter))))
	}
	if p.Code == ShuttingDown { // the next request on this connection would come here again: elsewhere it is served
		c.Context().SetConnectionClose()
	}
	c.Status(status).Set(fiber.HeaderContentType, "application/problem+json")
	return c.Send(mustJSON(p.body(requestID(c))))
}

// spreadRetry keeps clients that were sent away together, by what concerns all of them, from coming back together: once to
// three times the pause.
func spreadRetry(d time.Duration) time.Duration {
	if d <= 0 {
		d = defaultRetryAfter
	}
	return d + rand.N(2*d)
}

// retryAfterSeconds rounds up: a client that comes back early is refused again.
func retryAfterSeconds(d time.Duration) int {
	if d <= 0 {
		d = defaultRetryAfter
	}
	return int(math.Ceil(d.Seconds()))
}

// problemHandler answers errors as writeProblem does, and logs those that are the server's fault.
func problemHandler(log *slog.Logger) fiber.ErrorHandler {
	return func(c *fiber.Ctx, err error) error {
		if requestID(c) == "" { // the framework refused the request before the middleware saw it
			c.Set(fiber.HeaderXRequestID, utils.UUIDv4())
		}
		p := asProblem(err)
		if p.Code.Wire().Status >= 500 || p.Code.Wire().Status == 0 {
			log.ErrorContext(c.UserContext(), "request failed", "method", c.Method(), "path", c.Path(),
				"request_id", requestID(c), "code", p.Code, "error", p.Error())
		}
		return writeProblem(c, err)
	}
}

// recoverPanic turns a panic of any later handler into an error, which becomes an internal problem.
func recoverPanic(c *fiber.Ctx) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = &Problem{Code: Internal, Cause: fmt.Errorf("panic: %v\n%s", r, debug.Stack())}
		}
	}()
	return c.Next()
}

// requestID is the id that the requestid middleware gave the request.
func requestID(c *fiber.Ctx) string {
	return string(c.Response().Header.Peek(fiber.HeaderXRequestID))
}
