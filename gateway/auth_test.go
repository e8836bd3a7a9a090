package gateway

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

var testSecret = strings.Repeat("0123456789", 4)

// testNow is the time at which all test tokens are judged.
var testNow = time.Unix(1_800_000_000, 0)

func fixedNow() time.Time { return testNow }

// keys are made once: RSA keys are slow to make.
var keys = sync.OnceValue(func() (k struct {
	rsa, otherRSA, smallRSA *rsa.PrivateKey
	ec                      *ecdsa.PrivateKey
	ec384                   *ecdsa.PrivateKey
	ed                      ed25519.PrivateKey
}) {
	var errs [6]error
	k.rsa, errs[0] = rsa.GenerateKey(rand.Reader, 2048)
	k.otherRSA, errs[1] = rsa.GenerateKey(rand.Reader, 2048)
	k.smallRSA, errs[2] = rsa.GenerateKey(rand.Reader, 1024)
	k.ec, errs[3] = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	k.ec384, errs[4] = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	_, k.ed, errs[5] = ed25519.GenerateKey(rand.Reader)
	if err := errors.Join(errs[:]...); err != nil {
		panic(err)
	}
	return k
})

func publicPEM(t *testing.T, key crypto.PublicKey) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func sign(t *testing.T, method jwt.SigningMethod, key any, header, claims map[string]any) string {
	t.Helper()
	token := jwt.NewWithClaims(method, jwt.MapClaims(claims))
	for name, value := range header {
		token.Header[name] = value
	}
	text, err := token.SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// with returns valid claims, changed by pairs of name and value; a nil value removes the claim.
func with(pairs ...any) map[string]any {
	claims := map[string]any{"sub": "ana", "exp": testNow.Add(time.Hour).Unix(), "iss": "issuer", "aud": []string{"other", "walgate"}}
	for i := 0; i < len(pairs); i += 2 {
		claims[pairs[i].(string)] = pairs[i+1]
		if pairs[i+1] == nil {
			delete(claims, pairs[i].(string))
		}
	}
	return claims
}

func authenticator(t *testing.T, c AuthConfig) *Authenticator {
	t.Helper()
	a, err := newAuthenticator(t.Context(), c, nil, fixedNow)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// wantCode fails unless err is a *Problem with the code.
func wantCode(t *testing.T, err error, want Code) {
	t.Helper()
	var p *Problem
	if !errors.As(err, &p) || p.Code != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestVerify(t *testing.T) {
	t.Parallel()
	a := authenticator(t, AuthConfig{Secret: testSecret, Issuer: "issuer", Audience: "walgate", Leeway: 30 * time.Second})
	hs := func(pairs ...any) string {
		return sign(t, jwt.SigningMethodHS256, []byte(testSecret), nil, with(pairs...))
	}
	at := func(d time.Duration) int64 { return testNow.Add(d).Unix() }
	good := hs()
	for _, test := range []struct {
		name, token string
		want        Code // "": accepted
	}{
		{"good", good, ""},
		{"no token", "", InvalidToken},
		{"no JWT", "abc", InvalidToken},
		{"two parts", "a.b", InvalidToken},
		{"huge", strings.Repeat("a", maxTokenSize+1), InvalidToken},
		{"alg none", sign(t, jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, nil, with()), InvalidToken},
		{"HS512", sign(t, jwt.SigningMethodHS512, []byte(testSecret), nil, with()), InvalidToken},
		{"RS256", sign(t, jwt.SigningMethodRS256, keys().rsa, nil, with()), InvalidToken},
		{"other secret", sign(t, jwt.SigningMethodHS256, []byte(testSecret+"x"), nil, with()), InvalidToken},
		{"tampered", tamper(t, good), InvalidToken},
		{"signature cut", good[:strings.LastIndex(good, ".")+1], InvalidToken},
		{"wrong issuer", hs("iss", "other"), InvalidToken},
		{"no issuer", hs("iss", nil), InvalidToken},
		{"wrong audience", hs("aud", "other"), InvalidToken},
		{"no audience", hs("aud", nil), InvalidToken},
		{"expired", hs("exp", at(-time.Minute)), TokenExpired},
		{"expired within leeway", hs("exp", at(-29*time.Second)), ""},
		{"no exp", hs("exp", nil), InvalidToken},
		{"exp is text", hs("exp", "tomorrow"), InvalidToken},
		{"nbf ahead", hs("nbf", at(time.Minute)), InvalidToken},
		{"nbf within leeway", hs("nbf", at(29*time.Second)), ""},
		{"no sub", hs("sub", nil), InvalidToken},
		{"empty sub", hs("sub", ""), InvalidToken},
		{"sub with NUL", hs("sub", "a\x00b"), InvalidToken},
		{"long sub", hs("sub", strings.Repeat("a", 256)), InvalidToken},
		{"sub is a list", hs("sub", []string{"ana"}), InvalidToken},
		{"roles are numbers", hs("roles", []any{"a", 7}), InvalidToken},
		{"roles are a map", hs("roles", map[string]any{"a": 1}), InvalidToken},
		{"foreign headers", sign(t, jwt.SigningMethodHS256, []byte(testSecret), map[string]any{
			"jku": "http://127.0.0.1:1/", "x5u": "http://127.0.0.1:1/", "jwk": map[string]any{"kty": "oct", "k": "AA"}, "kid": "../x"}, with()), ""},
		{"crit", sign(t, jwt.SigningMethodHS256, []byte(testSecret), map[string]any{"crit": []string{"b64"}}, with()), InvalidToken},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			identity, err := a.Verify(t.Context(), test.token)
			if test.want != "" {
				wantCode(t, err, test.want)
				return
			}
			if err != nil || identity.Subject != "ana" {
				t.Errorf("got %+v, %v", identity, err)
			}
		})
	}
}

// tamper changes the subject and keeps the signature.
func tamper(t *testing.T, token string) string {
	t.Helper()
	parts := strings.Split(token, ".")
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	parts[1] = base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(string(payload), "ana", "bob", 1)))
	return strings.Join(parts, ".")
}

func TestIdentity(t *testing.T) {
	t.Parallel()
	claims := with("user", map[string]any{"id": 9007199254740993}, "realm_access", map[string]any{"roles": []string{"a", "b"}},
		"https://example.com/roles", "x  y", "big", json.Number("12345678901234567890"))
	token, err := SignHS256(testSecret, claims)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		subject, roles string
		wantSubject    string
		wantRoles      []string
	}{
		{"", "", "ana", nil},
		{"user.id", "realm_access.roles", "9007199254740993", []string{"a", "b"}},
		{"sub", "https://example.com/roles", "ana", []string{"x", "y"}},
		{"sub", "realm_access.none.deeper", "ana", nil},
	} {
		a := authenticator(t, AuthConfig{Secret: testSecret, SubjectClaim: test.subject, RolesClaim: test.roles, Leeway: time.Second})
		got, err := a.Verify(t.Context(), token)
		if err != nil {
			t.Errorf("%+v: %v", test, err)
			continue
		}
		if got.Subject != test.wantSubject || !reflect.DeepEqual(got.Roles, test.wantRoles) {
			t.Errorf("%+v: got %q, %q", test, got.Subject, got.Roles)
		}
		if got.Claims["big"] != json.Number("12345678901234567890") {
			t.Errorf("digits lost: %v", got.Claims["big"])
		}
		if want := testNow.Add(time.Hour + time.Second); !got.Expires.Equal(want) {
			t.Errorf("expires %v, want %v", got.Expires, want)
		}
	}
	for _, number := range []string{"1.0", "1e0", "-0", "1.5"} {
		if text, ok := subjectText(json.Number(number)); ok {
			t.Errorf("%s: accepted as subject %s", number, text)
		}
	}
}

func TestPublicKeys(t *testing.T) {
	t.Parallel()
	k := keys()
	for _, test := range []struct {
		name   string
		public crypto.PublicKey
		key    any
		method jwt.SigningMethod
		others []jwt.SigningMethod // of the same family of keys, but not of this key
	}{
		{"RS256", k.rsa.Public(), k.rsa, jwt.SigningMethodRS256, nil},
		{"PS512", k.rsa.Public(), k.rsa, jwt.SigningMethodPS512, nil},
		{"ES256", k.ec.Public(), k.ec, jwt.SigningMethodES256, nil},
		{"ES384", k.ec384.Public(), k.ec384, jwt.SigningMethodES384, nil},
		{"EdDSA", k.ed.Public(), k.ed, jwt.SigningMethodEdDSA, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			text := publicPEM(t, test.public)
			a := authenticator(t, AuthConfig{PublicKeyPEM: text})
			if _, err := a.Verify(t.Context(), sign(t, test.method, test.key, nil, with())); err != nil {
				t.Error(err)
			}
			// The classic confusion: the public key's text taken as the secret of an HMAC.
			for _, secret := range []string{text, strings.TrimSpace(text)} {
				_, err := a.Verify(t.Context(), sign(t, jwt.SigningMethodHS256, []byte(secret), nil, with()))
				wantCode(t, err, InvalidToken)
			}
			_, err := a.Verify(t.Context(), sign(t, jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, nil, with()))
			wantCode(t, err, InvalidToken)
			_, err = a.Verify(t.Context(), tamper(t, sign(t, test.method, test.key, nil, with())))
			wantCode(t, err, InvalidToken)
			_, err = a.Verify(t.Context(), sign(t, jwt.SigningMethodRS256, k.otherRSA, nil, with()))
			wantCode(t, err, InvalidToken)
		})
	}
}

func TestBadKeys(t *testing.T) {
	t.Parallel()
	k := keys()
	private, err := x509.MarshalPKCS8PrivateKey(k.ec)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		config AuthConfig
		want   string
	}{
		"none":        {AuthConfig{}, "exactly one"},
		"two":         {AuthConfig{Secret: testSecret, JWKSURL: "https://x"}, "exactly one"},
		"short":       {AuthConfig{Secret: testSecret[:31]}, "31 bytes"},
		"no PEM":      {AuthConfig{PublicKeyPEM: "abc"}, "PEM"},
		"private key": {AuthConfig{PublicKeyPEM: string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))}, "PRIVATE KEY"},
		"broken":      {AuthConfig{PublicKeyPEM: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: []byte("x")}))}, "read the JWT public key"},
		"small RSA":   {AuthConfig{PublicKeyPEM: publicPEM(t, k.smallRSA.Public())}, "1024 bits"},
		"P-224":       {AuthConfig{PublicKeyPEM: publicPEM(t, p224.Public())}, "P-256"},
		"plain http":  {AuthConfig{JWKSURL: "http://127.0.0.1/jwks"}, "https"},
	} {
		if _, err := NewAuthenticator(t.Context(), test.config, nil); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q in it", name, err, test.want)
		}
	}
	if _, err := SignHS256("short", nil); err == nil {
		t.Error("a short secret signs")
	}
}

func TestBearerToken(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]string{"Bearer a.b.c": "a.b.c", "bearer  a": "a", "Token a": "a", "Basic a": "", "": "", "Bearer": "", "a.b.c": ""} {
		if got := bearerToken(header); got != want {
			t.Errorf("%q: got %q, want %q", header, got, want)
		}
	}
}

// issuer serves a key set that tests replace.
type issuer struct {
	*httptest.Server
	body  atomic.Pointer[string]
	asked atomic.Int64
	fails atomic.Bool
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	i := &issuer{}
	i.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.asked.Add(1)
		switch {
		case i.fails.Load():
			w.WriteHeader(http.StatusInternalServerError)
		case r.URL.Path == "/moved":
			http.Redirect(w, r, "/jwks", http.StatusFound)
		default:
			_, _ = w.Write([]byte(*i.body.Load()))
		}
	}))
	t.Cleanup(i.Close)
	return i
}

func (i *issuer) serve(keys ...map[string]any) {
	text, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		panic(err)
	}
	body := string(text)
	i.body.Store(&body)
}

func jwk(kid string, key crypto.PublicKey, extra ...any) map[string]any {
	b64 := base64.RawURLEncoding.EncodeToString
	k := map[string]any{"kid": kid}
	switch key := key.(type) {
	case *rsa.PublicKey:
		k["kty"], k["n"], k["e"] = "RSA", b64(key.N.Bytes()), b64(big.NewInt(int64(key.E)).Bytes())
	case *ecdsa.PublicKey:
		point, err := key.Bytes()
		if err != nil {
			panic(err)
		}
		k["kty"], k["crv"], k["x"], k["y"] = "EC", key.Params().Name, b64(point[1:1+len(point)/2]), b64(point[1+len(point)/2:])
	case ed25519.PublicKey:
		k["kty"], k["crv"], k["x"] = "OKP", "Ed25519", b64(key)
	}
	for i := 0; i < len(extra); i += 2 {
		k[extra[i].(string)] = extra[i+1]
	}
	return k
}

func TestKeySet(t *testing.T) {
	t.Parallel()
	k := keys()
	i := newIssuer(t)
	unreachable := "https://127.0.0.1:1/"
	i.serve(jwk("r", k.rsa.Public(), "alg", "RS256", "x5u", unreachable), jwk("e", k.ec.Public()), jwk("d", k.ed.Public()),
		jwk("enc", k.otherRSA.Public(), "use", "enc"), jwk("small", k.smallRSA.Public()),
		map[string]any{"kty": "oct", "kid": "o", "k": base64.RawURLEncoding.EncodeToString([]byte(testSecret))}, map[string]any{"kty": "new"})
	clock := newFakeClock(testNow)
	a, err := newAuthenticator(t.Context(), AuthConfig{JWKSURL: i.URL + "/jwks"}, i.Client(), clock.now)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		method jwt.SigningMethod
		key    any
		kid    any
		want   Code
	}{
		{"RS256", jwt.SigningMethodRS256, k.rsa, "r", ""},
		{"another alg than the key's", jwt.SigningMethodPS256, k.rsa, "r", InvalidToken},
		{"ES256", jwt.SigningMethodES256, k.ec, "e", ""},
		{"EdDSA", jwt.SigningMethodEdDSA, k.ed, "d", ""},
		{"no kid", jwt.SigningMethodEdDSA, k.ed, nil, ""},
		{"kid of another key", jwt.SigningMethodES256, k.ec, "r", InvalidToken},
		{"kid is a number", jwt.SigningMethodES256, k.ec, 7, InvalidToken},
		{"key for encryption", jwt.SigningMethodRS256, k.otherRSA, "enc", InvalidToken},
		{"small key", jwt.SigningMethodRS256, k.smallRSA, "small", InvalidToken},
		{"symmetric key", jwt.SigningMethodHS256, []byte(testSecret), "o", InvalidToken},
		{"alg none", jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, "r", InvalidToken},
	} {
		header := map[string]any{"kid": test.kid, "jku": unreachable}
		if test.kid == nil {
			delete(header, "kid")
		}
		_, err := a.Verify(t.Context(), sign(t, test.method, test.key, header, with()))
		if test.want == "" && err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		if test.want != "" {
			wantCode(t, err, test.want)
		}
	}
}

func TestKeyRotation(t *testing.T) {
	t.Parallel()
	k := keys()
	i := newIssuer(t)
	i.serve(jwk("1", k.rsa.Public()))
	clock := newFakeClock(testNow)
	a, err := newAuthenticator(t.Context(), AuthConfig{JWKSURL: i.URL}, i.Client(), clock.now)
	if err != nil {
		t.Fatal(err)
	}
	verify := func(method jwt.SigningMethod, key any, kid string) error {
		_, err := a.Verify(t.Context(), sign(t, method, key, map[string]any{"kid": kid}, with()))
		return err
	}
	asked := func(want int64) {
		t.Helper()
		if got := i.asked.Load(); got != want {
			t.Errorf("the issuer was asked %d times, want %d", got, want)
		}
	}
	i.serve(jwk("2", k.ec.Public()))
	var wg sync.WaitGroup
	for range 8 { // all at once, one fetch
		wg.Go(func() {
			if err := verify(jwt.SigningMethodES256, k.ec, "2"); err != nil {
				t.Errorf("the new key: %v", err)
			}
		})
	}
	wg.Wait()
	asked(2)
	wantCode(t, verify(jwt.SigningMethodRS256, k.rsa, "1"), InvalidToken) // withdrawn, and no fetch within the minute
	for range 50 {
		wantCode(t, verify(jwt.SigningMethodES256, k.ec, "unknown"), InvalidToken)
	}
	asked(2)
	clock.advance(unknownKeyRefresh)
	i.fails.Store(true)
	wantCode(t, verify(jwt.SigningMethodEdDSA, k.ed, "3"), KeysUnavailable)
	wantCode(t, verify(jwt.SigningMethodEdDSA, k.ed, "3"), KeysUnavailable)
	asked(3)
	if err := verify(jwt.SigningMethodES256, k.ec, "2"); err != nil {
		t.Errorf("a known key while the issuer is down: %v", err)
	}
	i.fails.Store(false)
	i.serve(jwk("3", k.ed.Public()))
	clock.advance(unknownKeyRefresh)
	if err := verify(jwt.SigningMethodEdDSA, k.ed, "3"); err != nil {
		t.Error(err)
	}
	asked(4)
}

func TestKeySetIsRefused(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	for name, test := range map[string]struct{ path, body, want string }{
		"redirect":   {"/moved", "", "redirects are not followed"},
		"large":      {"/jwks", `{"keys":[` + strings.Repeat(" ", maxKeySetSize) + `]}`, "no key set"},
		"no JSON":    {"/jwks", "<html>", "no key set"},
		"empty":      {"/jwks", `{"keys":[]}`, "holds no"},
		"no numbers": {"/jwks", `{"keys":[{"kty":"RSA","kid":"a"}]}`, "holds no"},
	} {
		i.body.Store(&test.body)
		_, err := NewAuthenticator(t.Context(), AuthConfig{JWKSURL: i.URL + test.path}, i.Client())
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q in it", name, err, test.want)
		}
	}
	if _, err := NewAuthenticator(t.Context(), AuthConfig{JWKSURL: i.URL}, nil); err == nil {
		t.Error("a certificate that nobody vouches for was accepted")
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := NewAuthenticator(canceled, AuthConfig{JWKSURL: i.URL}, i.Client()); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// FuzzVerify holds Verify to its promise: an identity or a problem, never a panic and never a forged caller.
func FuzzVerify(f *testing.F) {
	a, err := newAuthenticator(context.Background(), AuthConfig{Secret: testSecret}, nil, fixedNow)
	if err != nil {
		f.Fatal(err)
	}
	good, err := SignHS256(testSecret, with())
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{"", "a.b.c", good, good[:len(good)-1], "e30.e30.", "eyJhbGciOiJub25lIn0.e30."} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, token string) {
		identity, err := a.Verify(t.Context(), token)
		if err == nil && token != good {
			t.Errorf("accepted %q as %+v", token, identity)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	a, err := NewAuthenticator(b.Context(), AuthConfig{Secret: testSecret}, nil)
	if err != nil {
		b.Fatal(err)
	}
	token, err := SignHS256(testSecret, map[string]any{"sub": "ana", "exp": time.Now().Add(time.Hour).Unix()})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := a.Verify(b.Context(), token); err != nil {
			b.Fatal(err)
		}
	}
}

// TestClientClaim: the device is what the configured claim says and nothing without one; a claim that is no text is refused.
func TestClientClaim(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		path  string
		claim any
		want  string
		code  Code
	}{
		{"", "phone", "", ""}, {"device.id", "phone", "phone", ""}, {"device.id", 7, "7", ""}, {"device.id", nil, "", ""},
		{"device.id", []string{"phone"}, "", InvalidToken}, {"device.id", "", "", InvalidToken}, {"device.id", strings.Repeat("x", maxSubjectSize+1), "", InvalidToken},
	} {
		token, err := SignHS256(testSecret, with("device", map[string]any{"id": test.claim}, "", "a claim without a name"))
		if err != nil {
			t.Fatal(err)
		}
		a := authenticator(t, AuthConfig{Secret: testSecret, ClientClaim: test.path})
		id, err := a.Verify(t.Context(), token)
		var p *Problem
		switch {
		case test.code == "" && (err != nil || id.ClientID != test.want):
			t.Errorf("%q %v: %+v, %v", test.path, test.claim, id, err)
		case test.code != "" && (!errors.As(err, &p) || p.Code != test.code):
			t.Errorf("%q %v: %v, want %s", test.path, test.claim, err, test.code)
		}
		if a.NamesClient() != (test.path != "") {
			t.Errorf("%q: names clients: %v", test.path, a.NamesClient())
		}
	}
}
