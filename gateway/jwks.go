package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/MicahParks/keyfunc/v3"
	"github.com/golang-jwt/jwt/v5"
)

const (
	maxKeySetSize     = 1 << 18
	keySetTimeout     = 5 * time.Second
	keySetInterval    = time.Hour   // a revoked key is forgotten after at most this
	unknownKeyRefresh = time.Minute // unknown key ids can't make walgate hammer the issuer
)

// keySet holds the keys behind a JWKS URL. Keys are swapped as a whole, so a reader sees one set.
type keySet struct {
	ctx    context.Context // of the authenticator, not of a request: a refresh serves everybody
	url    string
	client *http.Client
	log    *slog.Logger
	now    func() time.Time

	keys atomic.Pointer[keyfunc.Keyfunc]

	mu       sync.Mutex
	askedAt  time.Time // last refresh because of an unknown key id
	askedErr error     // its outcome
}

func newKeySet(ctx context.Context, address string, client *http.Client, log *slog.Logger, now func() time.Time) (*keySet, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, errors.New("the JWKS URL is not an https address; keys that come without TLS can be replaced on their way")
	}
	own := http.Client{Timeout: keySetTimeout}
	if client != nil {
		own.Transport = client.Transport
	}
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	s := &keySet{ctx: ctx, url: address, client: &own, log: log, now: now}
	if err := s.refresh(); err != nil {
		return nil, err
	}
	go s.keepFresh()
	return s, nil
}

// keepFresh fetches the set every hour until the authenticator's context ends. A failure keeps the former keys.
func (s *keySet) keepFresh() {
	ticker := time.NewTicker(keySetInterval)
	defer ticker.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-ticker.C:
			if err := s.refresh(); err != nil {
				s.log.Warn("the JWKS could not be fetched; the former keys stay in use", "error", err)
			}
		}
	}
}

func (s *keySet) refresh() error {
	request, err := http.NewRequestWithContext(s.ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return fmt.Errorf("fetch the JWKS: %w", err)
	}
	request.Header.Set("Accept", "application/jwk-set+json, application/json")
	response, err := s.client.Do(request)
	if err != nil {
		return fmt.Errorf("fetch the JWKS: %w", err)
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("fetch the JWKS: %s answered %s; give the address of the set itself, redirects are not followed", s.url, response.Status)
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, maxKeySetSize+1))
	if err != nil {
		return fmt.Errorf("fetch the JWKS: %w", err)
	}
	if len(body) > maxKeySetSize {
		return fmt.Errorf("fetch the JWKS: %s answered more than %d bytes, which is no key set", s.url, maxKeySetSize)
	}
	keys, err := parseKeySet(s.ctx, body, s.log)
	if err != nil {
		return fmt.Errorf("fetch the JWKS from %s: %w", s.url, err)
	}
	s.keys.Store(&keys)
	return nil
}

// parseKeySet keeps the keys that can verify tokens. Only their public numbers are read: certificates and addresses
// in a key (x5c, x5u) are not followed, private and symmetric keys are not used.
func parseKeySet(ctx context.Context, body []byte, log *slog.Logger) (keyfunc.Keyfunc, error) {
	var set jwkset.JWKSMarshal
	if err := json.Unmarshal(body, &set); err != nil {
		return nil, fmt.Errorf("the answer is no key set: %w", err)
	}
	storage := jwkset.NewMemoryStorage()
	usable := 0
	for _, k := range set.Keys {
		if k.KTY == jwkset.KtyOct || k.USE != "" && k.USE != jwkset.UseSig {
			continue
		}
		public := jwkset.JWKMarshal{KTY: k.KTY, KID: k.KID, ALG: k.ALG, USE: k.USE, CRV: k.CRV, X: k.X, Y: k.Y, N: k.N, E: k.E}
		key, err := jwkset.NewJWKFromMarshal(public, jwkset.JWKMarshalOptions{}, jwkset.JWKValidateOptions{})
		if err == nil {
			_, err = methodsOf(key.Key())
		}
		if err == nil {
			err = storage.KeyWrite(ctx, key)
		}
		if err != nil {
			log.Warn("a key of the JWKS is left out", "kid", k.KID, "error", err)
			continue
		}
		usable++
	}
	if usable == 0 {
		return nil, errors.New("the key set holds no RSA, ECDSA or Ed25519 key that can verify tokens")
	}
	return keyfunc.New(keyfunc.Options{Ctx: ctx, Storage: storage})
}

// keyfunc finds a token's key, after one refresh where its id is unknown.
func (s *keySet) keyfunc(ctx context.Context) jwt.Keyfunc {
	return func(token *jwt.Token) (any, error) {
		before := s.keys.Load()
		key, err := (*before).KeyfuncCtx(ctx)(token)
		if !errors.Is(err, jwkset.ErrKeyNotFound) {
			return key, err
		}
		if err := s.refreshUnknown(before); err != nil {
			return nil, NewProblem(KeysUnavailable, "the token names a key that is not known here, and the issuer's keys can't be fetched").Because(err)
		}
		return (*s.keys.Load()).KeyfuncCtx(ctx)(token)
	}
}

// refreshUnknown fetches the set at most once a minute; within the minute its outcome stands for all. Callers wait for
// a fetch under way rather than start another.
func (s *keySet) refreshUnknown(before *keyfunc.Keyfunc) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys.Load() != before {
		return nil // somebody else has just fetched it
	}
	if !s.askedAt.IsZero() && s.now().Sub(s.askedAt) < unknownKeyRefresh {
		return s.askedErr
	}
	s.askedAt, s.askedErr = s.now(), s.refresh()
	return s.askedErr
}
