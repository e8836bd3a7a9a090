package gateway

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	minSecretSize  = 32
	minRSABits     = 2048
	maxTokenSize   = 16 << 10
	maxSubjectSize = 255
)

// AuthConfig says whose tokens are accepted. Exactly one of Secret, PublicKeyPEM and JWKSURL is set.
type AuthConfig struct {
	Secret       string // HS256
	PublicKeyPEM string // RSA, ECDSA or Ed25519
	JWKSURL      string // https
	Issuer       string // empty: not looked at
	Audience     string // empty: not looked at
	Leeway       time.Duration
	SubjectClaim string       // dotted path; empty: sub
	RolesClaim   string       // dotted path; empty: roles
	ClientClaim  string       // dotted path; empty: tokens don't say which device they are of
	Log          *slog.Logger // nil: silent
}

// Identity is a verified caller.
type Identity struct {
	Subject  string
	Roles    []string
	ClientID string         // the device that the token is of; "" where it doesn't say
	Claims   map[string]any // numbers are json.Number
	Expires  time.Time      // from then on Verify refuses the token
}

// Authenticator verifies tokens. Safe for concurrent use.
type Authenticator struct {
	parser   *jwt.Parser
	key      func(context.Context) jwt.Keyfunc
	leeway   time.Duration
	subject  string
	rolePath string
	client   string
}

// NewAuthenticator checks the keys. With a JWKS URL it fetches the set at once and keeps it fresh until ctx ends;
// client may be nil.
func NewAuthenticator(ctx context.Context, c AuthConfig, client *http.Client) (*Authenticator, error) {
	return newAuthenticator(ctx, c, client, time.Now)
}

func newAuthenticator(ctx context.Context, c AuthConfig, client *http.Client, now func() time.Time) (*Authenticator, error) {
	a := &Authenticator{leeway: c.Leeway, subject: orDefault(c.SubjectClaim, "sub"), rolePath: orDefault(c.RolesClaim, "roles"), client: c.ClientClaim}
	methods, err := a.useKeys(ctx, c, client, now)
	if err != nil {
		return nil, err
	}
	options := []jwt.ParserOption{
		jwt.WithValidMethods(methods),
		jwt.WithJSONNumber(),
		jwt.WithExpirationRequired(),
		jwt.WithStrictDecoding(),
		jwt.WithLeeway(c.Leeway),
		jwt.WithTimeFunc(now),
	}
	if c.Issuer != "" {
		options = append(options, jwt.WithIssuer(c.Issuer))
	}
	if c.Audience != "" {
		options = append(options, jwt.WithAudience(c.Audience))
	}
	a.parser = jwt.NewParser(options...)
	return a, nil
}

func orDefault(text, fallback string) string {
	if text == "" {
		return fallback
	}
	return text
}

// useKeys sets a.key and returns the signing methods that fit the keys. The key decides on the method, never the
// token: a public key must not serve as an HMAC secret.
func (a *Authenticator) useKeys(ctx context.Context, c AuthConfig, client *http.Client, now func() time.Time) ([]string, error) {
	sources := 0
	for _, source := range []string{c.Secret, c.PublicKeyPEM, c.JWKSURL} {
		if source != "" {
			sources++
		}
	}
	switch {
	case sources != 1:
		return nil, fmt.Errorf("authentication needs exactly one of a secret, a public key and a JWKS URL, and has %d", sources)
	case c.JWKSURL != "":
		keys, err := newKeySet(ctx, c.JWKSURL, client, orSilent(c.Log), now)
		if err != nil {
			return nil, err
		}
		a.key = keys.keyfunc
		return asymmetricMethods, nil
	case c.PublicKeyPEM != "":
		key, methods, err := parsePublicKey(c.PublicKeyPEM)
		a.key = fixedKey(key)
		return methods, err
	case len(c.Secret) < minSecretSize:
		return nil, fmt.Errorf("the JWT secret has %d bytes and can be guessed; it needs %d or more", len(c.Secret), minSecretSize)
	}
	a.key = fixedKey([]byte(c.Secret))
	return []string{jwt.SigningMethodHS256.Alg()}, nil
}

func orSilent(log *slog.Logger) *slog.Logger {
	if log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return log
}

func fixedKey(key any) func(context.Context) jwt.Keyfunc {
	return func(context.Context) jwt.Keyfunc {
		return func(*jwt.Token) (any, error) { return key, nil }
	}
}

var (
	rsaMethods        = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
	asymmetricMethods = append([]string{"ES256", "ES384", "ES512", "EdDSA"}, rsaMethods...)
)

// parsePublicKey reads a PEM public key or certificate and names the methods that it verifies.
func parsePublicKey(text string) (any, []string, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, nil, errors.New("the JWT public key is not in PEM form (-----BEGIN PUBLIC KEY-----)")
	}
	var key any
	var err error
	switch block.Type {
	case "PUBLIC KEY":
		key, err = x509.ParsePKIXPublicKey(block.Bytes)
	case "RSA PUBLIC KEY":
		key, err = x509.ParsePKCS1PublicKey(block.Bytes)
	case "CERTIFICATE":
		var certificate *x509.Certificate
		if certificate, err = x509.ParseCertificate(block.Bytes); err == nil {
			key = certificate.PublicKey
		}
	default:
		return nil, nil, fmt.Errorf("the JWT public key file holds a %q; it needs a PUBLIC KEY, RSA PUBLIC KEY or CERTIFICATE", block.Type)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read the JWT public key: %w", err)
	}
	methods, err := methodsOf(key)
	return key, methods, err
}

// methodsOf returns the signing methods of a public key, or why it is not accepted.
func methodsOf(key any) ([]string, error) {
	switch key := key.(type) {
	case *rsa.PublicKey:
		if key.N.BitLen() < minRSABits {
			return nil, fmt.Errorf("the RSA key has %d bits; it needs %d or more", key.N.BitLen(), minRSABits)
		}
		return rsaMethods, nil
	case ed25519.PublicKey:
		return []string{"EdDSA"}, nil
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			return []string{"ES256"}, nil
		case elliptic.P384():
			return []string{"ES384"}, nil
		case elliptic.P521():
			return []string{"ES512"}, nil
		}
	}
	return nil, fmt.Errorf("a key of type %T can't verify tokens; use RSA, ECDSA (P-256, P-384, P-521) or Ed25519", key)
}

// bearerToken takes the token out of an Authorization header with the scheme Bearer or Token; "" where there is none.
func bearerToken(authorization string) string {
	scheme, token, _ := strings.Cut(strings.TrimSpace(authorization), " ")
	if strings.EqualFold(scheme, "Bearer") || strings.EqualFold(scheme, "Token") {
		return strings.TrimSpace(token)
	}
	return ""
}

// Verify returns whom a token names. Its error is a *Problem.
func (a *Authenticator) Verify(ctx context.Context, token string) (*Identity, error) {
	if token == "" {
		return nil, NewProblem(InvalidToken, "the request carries no token; send Authorization: Bearer")
	}
	if len(token) > maxTokenSize {
		return nil, NewProblem(InvalidToken, "the token is larger than %d bytes", maxTokenSize)
	}
	claims := jwt.MapClaims{}
	parsed, err := a.parser.ParseWithClaims(token, claims, a.key(ctx))
	if err != nil {
		return nil, tokenProblem(err)
	}
	if _, critical := parsed.Header["crit"]; critical {
		return nil, NewProblem(InvalidToken, "the token's header has critical extensions, and none is known here")
	}
	return a.identity(claims)
}

func (a *Authenticator) identity(claims jwt.MapClaims) (*Identity, error) {
	expires, err := claims.GetExpirationTime()
	if err != nil || expires == nil {
		return nil, NewProblem(InvalidToken, "the claim exp is no time").Because(err)
	}
	subject, ok := subjectText(claimAt(claims, a.subject))
	if !ok {
		return nil, NewProblem(InvalidToken, "the claim %s names no subject: a text of 1 to %d bytes is needed", a.subject, maxSubjectSize)
	}
	roles, ok := roleList(claimAt(claims, a.rolePath))
	if !ok {
		return nil, NewProblem(InvalidToken, "the claim %s holds no roles: a list of texts or a text with spaces is needed", a.rolePath)
	}
	id := &Identity{Subject: subject, Roles: roles, Claims: claims, Expires: expires.Add(a.leeway)}
	if client := claimAt(claims, a.client); a.NamesClient() && client != nil {
		if id.ClientID, ok = subjectText(client); !ok {
			return nil, NewProblem(InvalidToken, "the claim %s names no device: a text of 1 to %d bytes is needed", a.client, maxSubjectSize)
		}
	}
	return id, nil
}

// NamesClient says whether tokens say which device they are of, so that a request for another, or with a token that doesn't
// say it, is refused.
func (a *Authenticator) NamesClient() bool { return a.client != "" }

// tokenProblem says what is wrong with a token, in words that help its owner and nobody else.
func tokenProblem(err error) *Problem {
	var p *Problem
	if errors.As(err, &p) {
		return p
	}
	for _, known := range []struct {
		err    error
		code   Code
		detail string
	}{
		{jwt.ErrTokenMalformed, InvalidToken, "the token is no JSON Web Token"},
		{jwt.ErrTokenSignatureInvalid, InvalidToken, "the token's signature or algorithm is not accepted"},
		{jwt.ErrTokenUnverifiable, InvalidToken, "the token's signature can't be verified"},
		{jwt.ErrTokenRequiredClaimMissing, InvalidToken, "the token lacks a claim that is required here (exp, and iss and aud where configured)"},
		{jwt.ErrTokenInvalidIssuer, InvalidToken, "the token has another issuer"},
		{jwt.ErrTokenInvalidAudience, InvalidToken, "the token is for another audience"},
		{jwt.ErrTokenNotValidYet, InvalidToken, "the token is not valid yet"},
		{jwt.ErrTokenExpired, TokenExpired, ""},
	} {
		if errors.Is(err, known.err) {
			return &Problem{Code: known.code, Detail: known.detail, Cause: err}
		}
	}
	return &Problem{Code: InvalidToken, Cause: err}
}

// claimAt finds a claim by its name or else by its dotted path; names such as https://example.com/roles hold dots
// themselves.
func claimAt(claims map[string]any, path string) any {
	if value, ok := claims[path]; ok {
		return value
	}
	for {
		name, rest, deeper := strings.Cut(path, ".")
		if !deeper {
			return claims[name]
		}
		inner, ok := claims[name].(map[string]any)
		if !ok {
			return nil
		}
		claims, path = inner, rest
	}
}

var wholePattern = regexp.MustCompile(`^(0|-?[1-9][0-9]*)$`)

// subjectText accepts a text, or a whole number in its one spelling. NUL is refused because PostgreSQL can't store it.
func subjectText(value any) (string, bool) {
	var text string
	switch value := value.(type) {
	case string:
		text = value
	case json.Number:
		if !wholePattern.MatchString(value.String()) {
			return "", false
		}
		text = value.String()
	}
	return text, text != "" && len(text) <= maxSubjectSize && !strings.ContainsRune(text, 0)
}

// roleList reads a list of texts or a text with spaces; absent or null is no role.
func roleList(value any) ([]string, bool) {
	switch value := value.(type) {
	case nil:
		return nil, true
	case string:
		return strings.Fields(value), true
	case []any:
		roles := make([]string, 0, len(value))
		for _, element := range value {
			role, ok := element.(string)
			if !ok {
				return nil, false
			}
			roles = append(roles, role)
		}
		return roles, true
	}
	return nil, false
}

// SignHS256 makes a token that an Authenticator with the same secret accepts.
func SignHS256(secret string, claims map[string]any) (string, error) {
	if len(secret) < minSecretSize {
		return "", fmt.Errorf("sign a token: the secret has %d bytes; it needs %d or more", len(secret), minSecretSize)
	}
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims(claims)).SignedString([]byte(secret))
	if err != nil {
		return "", fmt.Errorf("sign a token: %w", err)
	}
	return token, nil
}
