package gateway

import (
	"context"
	_ "embed"
	"maps"
	"time"

	"github.com/gofiber/fiber/v2"
)

// staleAfter is the silence of the walsender after which the leader isn't ready: a live one sends keepalives.
const staleAfter = 15 * time.Second

// readyz says whether clients should be sent here, and why not. A stopped collection doesn't stop the others: it is named,
// and its requests answer 503.
func (g *Gateway) readyz(c *fiber.Ctx) error {
	ctx, cancel := context.WithTimeout(g.serving, 2*time.Second)
	defer cancel()
	problems := map[string]string{}
	if g.draining.Load() {
		problems["server"] = "stopping"
	} else if err := g.o.Log.Ping(ctx); err != nil {
		problems["change_log"] = "its database doesn't answer, so clients get nothing from here; see that it runs and that the network to it is up: " + err.Error()
	}
	head, ok := g.hub.position()
	if !ok {
		problems["change_log"] = "not started or not read yet"
	}
	s := g.o.SourceStatus()
	degraded := map[string]string{}
	switch {
	case s.Err != "":
		degraded["replication"] = s.Err
	case s.Leading && !s.LastHeard.IsZero() && time.Since(s.LastHeard) > staleAfter:
		degraded["replication"] = "the source has been silent for " + time.Since(s.LastHeard).Round(time.Second).String()
	case s.Standby != "":
	case !s.Leading:
		degraded["replication"] = "not leading"
	}
	if s.Waiting != "" {
		degraded["append"] = s.Waiting
	}
	if g.o.Redis != nil {
		if why, since := g.o.Redis.Down(); why != "" {
			degraded["redis"] = "can't be used since " + since.UTC().Format(time.RFC3339) + ", so this instance learns of changes from the change log, a moment later: " + why
		}
	}
	for name, why := range s.Impaired {
		degraded["collection "+name] = why
	}
	for _, col := range head.Collections {
		if col.Stopped != "" {
			degraded["collection "+col.Name] = col.Stopped
		}
	}
	for name, why := range s.Stopped { // newer than what the log says
		degraded["collection "+name] = why
	}
	state, code := "ready", fiber.StatusOK
	if len(degraded) > 0 {
		state = "degraded"
	}
	if len(problems) > 0 {
		state, code = "not ready", fiber.StatusServiceUnavailable
		maps.Copy(degraded, problems)
	}
	return c.Status(code).JSON(fiber.Map{"status": state, "problems": degraded, "leading": s.Leading, "standby": s.Standby,
		"received_lsn": s.Received.String(), "logged_lsn": s.Logged.String(), "acknowledged_lsn": s.Acknowledged.String(), "slot_lag_bytes": s.SlotLag})
}

//go:embed openapi.json
var openAPIDocument []byte

// openAPI describes what is served.
func openAPI(c *fiber.Ctx) error {
	c.Set(fiber.HeaderContentType, fiber.MIMEApplicationJSON)
	return c.Send(openAPIDocument)
}
