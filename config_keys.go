package main

import (
	"math"
	"time"
)

// key ties one key of the configuration to the field that takes its value.
type key struct {
	path     string // dotted: "http.listen"
	into     any    // pointer to the field: *string, *bool, *int, *int64, *Size, *time.Duration, *[]string, *Secret or *DSN
	min, max int64  // for numbers, sizes (bytes) and durations (nanoseconds)
	// check returns what was expected instead, or "" where the text is right. For a list it sees each element.
	check    func(text string) string
	words    []string // the only right texts
	required bool
	nonEmpty bool // a list or text that is written must say something
}

// defaultConfig holds the defaults; config.yaml repeats them and a test compares the two.
func defaultConfig() *Config {
	return &Config{
		Database:    DatabaseConfig{URL: defaultDatabaseURL, PoolSize: 20},
		Storage:     StorageConfig{PoolSize: 16},
		Replication: ReplicationConfig{Slot: "walgate", Publication: "walgate"},
		Catalog:     CatalogConfig{PollInterval: 5 * time.Second},
		HTTP:        HTTPConfig{Listen: ":8080", PublicURL: "http://localhost:8080"},
		Push:        PushConfig{EchoTimeout: 2 * time.Second, IdempotencyRetention: 30 * 24 * time.Hour},
		Limits: LimitsConfig{
			MaxSlotLag:                  8 << 30,
			PushBody:                    16 << 20,
			Frame:                       1 << 20,
			Attachment:                  2 << 30,
			Quota:                       10 << 30,
			Drain:                       20 * time.Second,
			RequestsPerSecond:           50,
			Burst:                       100,
			SendMemory:                  256 << 20,
			FullConcurrency:             8,
			StreamConnections:           10000,
			StreamConnectionsPerSubject: 20,
		},
		Auth: AuthConfig{
			JWT:    JWTConfig{Leeway: 30 * time.Second},
			Claims: ClaimsConfig{Subject: "sub", Roles: "roles"},
		},
		Blobs:       BlobsConfig{URL: "file:///var/lib/walgate/blobs"},
		Attachments: AttachmentsConfig{Grace: 24 * time.Hour, URLTTL: 15 * time.Minute, SweepGuard: 20, UploadTTL: 24 * time.Hour},
		Log:         LogConfig{Level: "info", Format: "json"},
	}
}

// defaultDatabaseURL is expanded like a value of the file.
const defaultDatabaseURL = "${DATABASE_URL}"

// maxRetention bounds durations for which rows are kept.
const maxRetention = 36500 * 24 * time.Hour

// configKeys lists every key but collections, in the order of config.yaml.
func configKeys(c *Config) []key {
	second := int64(time.Second)
	keys := []key{
		{path: "config_revision", into: &c.Revision, min: 0, max: math.MaxInt64},
		{path: "auto_init", into: &c.AutoInit},
		{path: "database.url", into: &c.Database.URL, check: checkDSN, required: true},
		{path: "database.replication_url", into: &c.Database.ReplicationURL, check: checkDSN},
		{path: "database.pool_size", into: &c.Database.PoolSize, min: 4, max: 1000},
		{path: "storage.url", into: &c.Storage.URL, check: checkDSN},
		{path: "storage.pool_size", into: &c.Storage.PoolSize, min: 4, max: 1000},
		{path: "replication.slot", into: &c.Replication.Slot, check: checkSlot},
		{path: "replication.publication", into: &c.Replication.Publication, check: checkPublication},
		{path: "redis.url", into: &c.Redis.URL, check: checkRedisURL},
		{path: "catalog.poll_interval", into: &c.Catalog.PollInterval, min: int64(100 * time.Millisecond), max: 5 * second},
		{path: "http.listen", into: &c.HTTP.Listen, check: checkListen},
		{path: "http.public_url", into: &c.HTTP.PublicURL, check: checkPublicURL},
		{path: "http.allowed_origins", into: &c.HTTP.AllowedOrigins, check: checkOrigin},
		{path: "http.trusted_proxies", into: &c.HTTP.TrustedProxies, check: checkProxy},
		{path: "http.tls.cert_file", into: &c.HTTP.TLS.CertFile},
		{path: "http.tls.key_file", into: &c.HTTP.TLS.KeyFile},
		{path: "push.role", into: &c.Push.Role, check: checkRole},
		{path: "push.echo_timeout", into: &c.Push.EchoTimeout, min: 0, max: 20 * second},
		{path: "push.idempotency_retention", into: &c.Push.IdempotencyRetention, min: second, max: int64(maxRetention)},
		{path: "limits.max_slot_lag", into: &c.Limits.MaxSlotLag, min: 1 << 20, max: math.MaxInt64},
		{path: "limits.push_body", into: &c.Limits.PushBody, min: 1 << 10, max: 1 << 30},
		{path: "limits.frame", into: &c.Limits.Frame, min: 1 << 10, max: 64 << 20},
		{path: "limits.attachment", into: &c.Limits.Attachment, min: 1 << 10, max: 5 << 40},
		{path: "limits.quota", into: &c.Limits.Quota, min: 1 << 10, max: math.MaxInt64},
		{path: "limits.drain", into: &c.Limits.Drain, min: 0, max: int64(time.Hour)},
		{path: "limits.requests_per_second", into: &c.Limits.RequestsPerSecond, min: 1, max: 1e6},
		{path: "limits.burst", into: &c.Limits.Burst, min: 1, max: 1e6},
		{path: "limits.send_memory", into: &c.Limits.SendMemory, min: 16 << 20, max: math.MaxInt64},
		{path: "limits.full_concurrency", into: &c.Limits.FullConcurrency, min: 1, max: 1000},
		{path: "limits.stream_connections", into: &c.Limits.StreamConnections, min: 1, max: 1e6},
		{path: "limits.stream_connections_per_subject", into: &c.Limits.StreamConnectionsPerSubject, min: 1, max: 1e6},
		{path: "auth.jwt.secret", into: &c.Auth.JWT.Secret, check: checkSecret},
		{path: "auth.jwt.public_key_file", into: &c.Auth.JWT.PublicKeyFile},
		{path: "auth.jwt.jwks_url", into: &c.Auth.JWT.JWKSURL, check: checkJWKSURL},
		{path: "auth.jwt.issuer", into: &c.Auth.JWT.Issuer},
		{path: "auth.jwt.audience", into: &c.Auth.JWT.Audience},
		{path: "auth.jwt.leeway", into: &c.Auth.JWT.Leeway, min: 0, max: int64(5 * time.Minute)},
		{path: "auth.claims.subject", into: &c.Auth.Claims.Subject, check: checkClaim},
		{path: "auth.claims.roles", into: &c.Auth.Claims.Roles, check: checkClaim},
		{path: "auth.claims.client", into: &c.Auth.Claims.Client, check: checkOptionalClaim},
		{path: "log.level", into: &c.Log.Level, words: []string{"debug", "info", "warn", "error"}},
		{path: "log.format", into: &c.Log.Format, words: []string{"json", "text"}},
	}
	return append(keys, attachmentKeys(c)...)
}
