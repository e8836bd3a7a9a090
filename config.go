package main

import (
	"cmp"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/walgate/walgate/policies"
)

// annotatedConfig is config.yaml: every key with its default, unit and meaning.
//
//go:embed config.yaml
var annotatedConfig string

// maxConfigSize bounds the configuration file; a larger one is a mistaken path rather than a configuration.
const maxConfigSize = 1 << 18

// Config is the whole configuration. config.yaml says what each key means; configKeys ties keys to these fields.
type Config struct {
	Revision    int64
	AutoInit    bool
	Database    DatabaseConfig
	Storage     StorageConfig
	Replication ReplicationConfig
	Redis       RedisConfig
	Catalog     CatalogConfig
	HTTP        HTTPConfig
	Push        PushConfig
	Limits      LimitsConfig
	Auth        AuthConfig
	Blobs       BlobsConfig
	Attachments AttachmentsConfig
	Log         LogConfig
	Collections map[string]policies.Spec

	path      string
	positions map[string]string
}

// DatabaseConfig is the application's PostgreSQL.
type DatabaseConfig struct {
	URL            DSN
	ReplicationURL DSN // empty: URL
	PoolSize       int
}

// StorageConfig is where the change log lives.
type StorageConfig struct {
	URL      DSN // empty: the source
	PoolSize int
}

// ReplicationConfig names what walgate owns in the source.
type ReplicationConfig struct {
	Slot        string
	Publication string
}

// RedisConfig is what instances tell each other through.
type RedisConfig struct {
	URL Secret // see changelog.RedisURLs; empty: none
}

// CatalogConfig says how often the source's catalog is compared with what was compiled.
type CatalogConfig struct{ PollInterval time.Duration }

// HTTPConfig is the server that clients talk to.
type HTTPConfig struct {
	Listen         string
	PublicURL      string
	AllowedOrigins []string
	TrustedProxies []string
	TLS            TLSConfig
}

// TLSConfig names the files of the server's certificate; both empty: plain HTTP.
type TLSConfig struct{ CertFile, KeyFile string }

// PushConfig says how clients' changes are written.
type PushConfig struct {
	Role                 string // that writes; empty: that of database.url
	EchoTimeout          time.Duration
	IdempotencyRetention time.Duration
}

// LimitsConfig bounds what clients and the slot may use.
type LimitsConfig struct {
	MaxSlotLag                  Size
	PushBody                    Size
	Frame                       Size
	Attachment                  Size
	Quota                       Size
	Drain                       time.Duration
	RequestsPerSecond           int
	Burst                       int
	SendMemory                  Size
	FullConcurrency             int
	StreamConnections           int
	StreamConnectionsPerSubject int
}

// AuthConfig says whose tokens are accepted and where their claims are.
type AuthConfig struct {
	JWT    JWTConfig
	Claims ClaimsConfig
}

// JWTConfig names exactly one key source and what a token must say.
type JWTConfig struct {
	Secret        Secret
	PublicKeyFile string
	JWKSURL       string
	Issuer        string
	Audience      string
	Leeway        time.Duration
}

// ClaimsConfig holds the dotted paths of the claims that name a caller.
type ClaimsConfig struct{ Subject, Roles, Client string }

// LogConfig shapes walgate's own log.
type LogConfig struct{ Level, Format string }

// Secret is a value that is never printed.
type Secret string

// String hides the value.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return "[redacted]"
}

// GoString hides the value from %#v.
func (s Secret) GoString() string { return fmt.Sprintf("%q", s.String()) }

// MarshalText hides the value from encoders.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue hides the value from slog.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// DSN is a PostgreSQL connection string. It prints without its password.
type DSN string

var dsnPassword = regexp.MustCompile(`(?i)(password\s*=\s*)('(?:[^'\\]|\\.)*'?|(?:[^\s\\]|\\.)+)`)

// String returns the connection string without its password, or a placeholder where it can't be told what the password is.
func (d DSN) String() string {
	switch {
	case d == "":
		return ""
	case strings.Contains(string(d), "://"):
		u, err := url.Parse(string(d))
		if err != nil {
			return "[redacted]"
		}
		if q := u.Query(); q.Has("password") || q.Has("sslpassword") {
			u.RawQuery = ""
		}
		return u.Redacted()
	default:
		return dsnPassword.ReplaceAllString(string(d), "${1}xxxxx")
	}
}

// GoString hides the password from %#v.
func (d DSN) GoString() string { return fmt.Sprintf("%q", d.String()) }

// MarshalText hides the password from encoders.
func (d DSN) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// LogValue hides the password from slog.
func (d DSN) LogValue() slog.Value { return slog.StringValue(d.String()) }

// Size is a number of bytes.
type Size int64

// Load reads the configuration from a file and the environment. Its error is a *ConfigError that holds every fault,
// or says why the file can't be read.
func Load(path string, env func(string) (string, bool)) (*Config, error) {
	data, err := readConfig(path)
	if err != nil {
		return nil, err
	}
	return parseConfig(path, data, env)
}

func readConfig(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err == nil && !info.IsDir() && info.Size() > maxConfigSize {
		return nil, fmt.Errorf("read the configuration: %s has %d bytes, more than the %d that a configuration may have; check --config",
			path, info.Size(), maxConfigSize)
	}
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("read the configuration: there is no file %s; name one with --config FILE or WALGATE_CONFIG: %w", path, os.ErrNotExist)
	case err != nil:
		return nil, fmt.Errorf("read the configuration: %w", err)
	}
	return data, nil
}

func parseConfig(path string, data []byte, env func(string) (string, bool)) (*Config, error) {
	d := &decoder{path: path, env: env, positions: map[string]mark{}}
	c := defaultConfig()
	c.path = path
	keys := configKeys(c)
	if d.file(data, keys, c) {
		d.environment(keys)
		d.defaults(keys)
		d.checkTogether(c)
	}
	if len(d.faults) > 0 {
		slices.SortStableFunc(d.faults, func(a, b Fault) int {
			return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
		})
		return nil, &ConfigError{Faults: d.faults}
	}
	c.positions = make(map[string]string, len(d.positions))
	for key, at := range d.positions {
		c.positions[key] = fmt.Sprintf("%s:%d", path, at.line)
		if at.variable != "" {
			c.positions[key] = "environment variable " + at.variable
		}
	}
	return c, nil
}

// Position returns "file:line" of a key such as "collections.tasks.scope.owner_id", or of its nearest parent that the
// file names.
func (c *Config) Position(key string) string {
	for key != "" {
		if at, ok := c.positions[key]; ok {
			return at
		}
		key = key[:max(strings.LastIndexByte(key, '.'), 0)]
	}
	return c.path
}

// ConfigError is every fault of a configuration.
type ConfigError struct{ Faults []Fault }

// Fault is one thing wrong with the configuration.
type Fault struct {
	At     string // "file:line:column", or the environment variable that holds the value
	Line   int    // orders faults
	Column int
	Key    string // "http.listen"
	Got    string
	Want   string
	Hint   string // the nearest right name or the remedy; may be empty
}

// String is the fault on one line.
func (f Fault) String() string {
	var b strings.Builder
	b.WriteString(f.At)
	if f.Key != "" {
		b.WriteString(": " + f.Key)
	}
	b.WriteString(": found " + f.Got)
	if f.Want != "" {
		b.WriteString(", expected " + f.Want)
	}
	if f.Hint != "" {
		b.WriteString("; " + f.Hint)
	}
	return b.String()
}

// Error lists all faults, one a line.
func (e *ConfigError) Error() string {
	lines := make([]string, 0, len(e.Faults)+1)
	noun := "faults"
	if len(e.Faults) == 1 {
		noun = "fault"
	}
	lines = append(lines, fmt.Sprintf("the configuration has %d %s:", len(e.Faults), noun))
	for _, f := range e.Faults {
		lines = append(lines, "  "+f.String())
	}
	return strings.Join(lines, "\n")
}

// FaultsError gives the faults that policies found their places in the file; nil where there are none.
func FaultsError(c *Config, faults []policies.Fault) error {
	if len(faults) == 0 {
		return nil
	}
	e := &ConfigError{}
	for i, f := range faults {
		if f.Hint != "" && slices.ContainsFunc(faults[:i], func(before policies.Fault) bool { return before.Path == f.Path && before.Hint == f.Hint }) {
			continue // found in two ways
		}
		e.Faults = append(e.Faults, Fault{At: c.Position(f.Path), Key: f.Path, Got: f.Got, Want: f.Want, Hint: f.Hint})
	}
	return e
}
