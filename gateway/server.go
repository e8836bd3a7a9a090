package gateway

import (
	"context"
	"strings"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/gofiber/fiber/v2/middleware/cors"
	"github.com/gofiber/fiber/v2/middleware/requestid"
	"github.com/gofiber/fiber/v2/utils"
)

// bodyLimit is for routes that take no body; the others read theirs with limits of their own.
const bodyLimit = 64 << 10

// routes makes the HTTP server.
func (g *Gateway) routes() *fiber.App {
	app := fiber.New(fiber.Config{
		AppName: "walgate", DisableStartupMessage: true, CaseSensitive: true, ErrorHandler: problemHandler(g.o.Logger),
		BodyLimit: bodyLimit, ReadTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute, WriteTimeout: time.Minute, ReadBufferSize: 16 << 10,
		DisablePreParseMultipartForm: true, StreamRequestBody: true, RequestMethods: fiber.DefaultMethods,
		EnableTrustedProxyCheck: true, TrustedProxies: g.o.TrustedProxies, ProxyHeader: proxyHeader(g.o.TrustedProxies),
	})
	app.Use(requestid.New(), g.settleBody, recoverPanic)
	if len(g.o.AllowedOrigins) > 0 {
		app.Use(cors.New(cors.Config{AllowOrigins: strings.Join(g.o.AllowedOrigins, ","),
			AllowHeaders: "Authorization, Content-Type, If-Match, If-None-Match, If-Modified-Since, If-Range, Range, Content-Digest, Repr-Digest, X-Request-ID, " + tusRequestHeaders,
			ExposeHeaders: "X-Sync-Cursor, X-Sync-LastSeq, X-Sync-Mode, X-Sync-Settles, Retry-After, X-Request-ID, " +
				"ETag, Last-Modified, Content-Range, Accept-Ranges, Content-Disposition, Repr-Digest, " + tusAnswerHeaders}))
	}
	app.Get("/healthz", func(c *fiber.Ctx) error { return c.JSON(fiber.Map{"status": "alive"}) })
	app.Get("/readyz", g.readyz)
	app.Get("/metrics", g.metrics.handler())
	app.Get("/openapi.json", openAPI)
	sync := app.Group("/sync")
	sync.Get("/pull", g.authenticated, g.pull)
	sync.Get("/full", g.authenticated, g.full)
	sync.Get("/stream", g.upgrade)
	sync.Post("/push", g.authenticated, g.answerPush)
	sync.Post("/sessions", g.authenticated, g.openSession)
	sync.Post("/sessions/:sync_uuid/complete", g.authenticated, g.completeSession)
	app.Post("/attachments/manifest", g.authenticated, g.manifest)
	app.Get("/attachments", g.authenticated, g.counted("list", g.listAttachments))
	app.Get("/attachments/:id", g.counted("get", g.getAttachment))
	app.Put("/attachments/:id", g.authenticated, g.counted("put", g.putAttachment))
	app.Delete("/attachments/:id", g.authenticated, g.counted("delete", g.deleteAttachment))
	app.Get("/attachments/:id/download-url", g.authenticated, g.counted("download_url", g.downloadLink))
	app.Post("/attachments/:id/upload-url", g.authenticated, g.counted("upload_url", g.uploadLink))
	app.Post("/attachments/:id/upload-complete", g.authenticated, g.counted("upload_complete", g.uploadComplete))
	g.tusRoutes(app)
	app.Server().KeepHijackedConns = true // streams close them; see accept
	app.Server().HeaderReceived = holdBody
	return app
}

func proxyHeader(trusted []string) string {
	if len(trusted) == 0 {
		return ""
	}
	return fiber.HeaderXForwardedFor
}

// token takes the token of the header. It is a copy: the framework reuses the request's memory.
func token(c *fiber.Ctx) string {
	return utils.CopyString(bearerToken(c.Get(fiber.HeaderAuthorization)))
}

type identityKey struct{}

func identityOf(c *fiber.Ctx) *Identity { return c.Locals(identityKey{}).(*Identity) }

// authenticated lets only valid tokens through, at the subject's rate.
func (g *Gateway) authenticated(c *fiber.Ctx) error {
	if err := g.authenticate(c); err != nil {
		return err
	}
	return c.Next()
}

func (g *Gateway) authenticate(c *fiber.Ctx) error {
	if g.draining.Load() {
		return &Problem{Code: ShuttingDown, RetryAfter: 2 * time.Second}
	}
	ctx, cancel := context.WithTimeout(g.working, 10*time.Second)
	defer cancel()
	id, err := g.auth.Verify(ctx, token(c))
	if err != nil {
		return err
	}
	if err := g.admit(ctx, id.Subject); err != nil {
		return err
	}
	c.Locals(identityKey{}, id)
	return nil
}
