package changelog

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/internal/redisserver"
)

// openBus returns a running end of the test's bus at url.
func openBus(t *testing.T, url string) *RedisBus {
	t.Helper()
	r, err := OpenRedis(RedisOptions{URL: url, Namespace: strings.ReplaceAll(t.Name(), "/", "."), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	b := NewRedisBus(r)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// awaitWell waits until the bus can, or can't, use Redis.
func awaitWell(t *testing.T, b *RedisBus, want bool) {
	t.Helper()
	defer func() {
		if why, _ := b.redis.Down(); t.Failed() {
			t.Logf("Redis is away: %q", why)
		}
	}()
	awaitThat(t, fmt.Sprintf("the bus is well: %t", want), func() bool {
		why, _ := b.redis.Down()
		return (why == "" && b.stats.Subscribed.Load() > 0) == want
	})
}

func awaitThat(t *testing.T, what string, is func() bool) {
	t.Helper()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for deadline := time.After(30 * time.Second); !is(); {
		select {
		case <-again.C:
		case <-deadline:
			t.Fatalf("never: %s", what)
		}
	}
}

func TestRedisBusConforms(t *testing.T) {
	t.Parallel()
	server := redisserver.ForTest(t)
	busConformance(t, func(t *testing.T) (Bus, Bus) {
		here, there := openBus(t, server.URL()), openBus(t, server.URL())
		awaitWell(t, here, true)
		awaitWell(t, there, true)
		return here, there
	})
}

// TestRedisBusHeals: whatever happens to Redis, the bus works again by itself, and who subscribes is told at once to look at the
// log, and again and again while Redis is away.
func TestRedisBusHeals(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]struct {
		begin, end func(*testing.T, *redisserver.Server) error
	}{
		"killed":  {func(_ *testing.T, s *redisserver.Server) error { return s.Kill() }, func(t *testing.T, s *redisserver.Server) error { return s.Restart(t.Context()) }},
		"stopped": {func(_ *testing.T, s *redisserver.Server) error { return s.Stop() }, func(t *testing.T, s *redisserver.Server) error { return s.Restart(t.Context()) }},
		"silent":  {func(_ *testing.T, s *redisserver.Server) error { return s.Pause() }, func(_ *testing.T, s *redisserver.Server) error { return s.Resume() }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := redisserver.StartForTest(t, redisserver.Options{})
			here, there := openBus(t, server.URL()), openBus(t, server.URL())
			awaitWell(t, here, true)
			awaitWell(t, there, true)
			sub := there.Subscribe(t.Context())
			if err := fault.begin(t, server); err != nil {
				t.Fatal(err)
			}
			began := there.stats.Subscribed.Load()
			awaitHints(t, sub, 3)
			awaitWell(t, there, false)
			here.Publish(&Batch{History: "a1b2", Last: 4}) // goes nowhere, and holds nobody up
			awaitThat(t, "the publisher gives up", func() bool { return here.stats.Dropped.Load() > 0 })
			if err := fault.end(t, server); err != nil {
				t.Fatal(err)
			}
			awaitThat(t, "another subscription", func() bool { return there.stats.Subscribed.Load() > began })
			awaitHints(t, sub, 1)
			awaitBatch(t, here, sub, &Batch{History: "a1b2", Prev: 4, Last: 5})
			awaitWell(t, here, true)
		})
	}
}

// awaitHints waits for so many requests to look at the log.
func awaitHints(t *testing.T, sub <-chan *Batch, n int) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for n > 0 {
		select {
		case b := <-sub:
			if b.Omitted && b.History == "" {
				n--
			}
		case <-deadline:
			t.Fatalf("%d hints are missing", n)
		}
	}
}

// TestRedisBusBeginsWithoutRedis: an instance that starts while Redis is away serves, polls, and finds Redis when it comes.
func TestRedisBusBeginsWithoutRedis(t *testing.T) {
	t.Parallel()
	server := redisserver.StartForTest(t, redisserver.Options{})
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	b := openBus(t, server.URL())
	awaitHints(t, b.Subscribe(t.Context()), 3)
	if why, since := b.redis.Down(); why == "" || since.IsZero() {
		t.Error("it doesn't say that Redis is away")
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitWell(t, b, true)
}

// TestRedisBusCutSubscription: the server ends the subscription alone.
func TestRedisBusCutSubscription(t *testing.T) {
	t.Parallel()
	server := redisserver.StartForTest(t, redisserver.Options{})
	b := openBus(t, server.URL())
	awaitWell(t, b, true)
	sub := b.Subscribe(t.Context())
	began := b.stats.Subscribed.Load()
	if _, err := server.Do(t.Context(), "CLIENT", "KILL", "TYPE", "pubsub"); err != nil {
		t.Fatal(err)
	}
	awaitThat(t, "another subscription", func() bool { return b.stats.Subscribed.Load() > began })
	awaitHints(t, sub, 1)
}

// TestRedisBusBoundsMessages: a large batch goes by its position; what Redis gets is bounded.
func TestRedisBusBoundsMessages(t *testing.T) {
	t.Parallel()
	server := redisserver.ForTest(t)
	here, there := openBus(t, server.URL()), openBus(t, server.URL())
	awaitWell(t, here, true)
	awaitWell(t, there, true)
	sub := there.Subscribe(t.Context())
	large := &Batch{Claim: 3, History: "a1b2", Prev: 4, Last: 9, LSN: 7, Entries: []Entry{{Version: 9, Data: make([]byte, messageMost)}}}
	got := awaitBatch(t, here, sub, large)
	if !got.Omitted || got.Entries != nil || got.Prev != 4 || got.LSN != 7 || got.Claim != 3 {
		t.Errorf("got %+v", got)
	}
	if here.stats.Positions.Load() == 0 {
		t.Error("not counted as announced by its position")
	}
	if n := len(appendBatch(nil, 1, announced(large))); n > 200 {
		t.Errorf("its message has %d bytes", n)
	}
	fits := &Batch{Entries: []Entry{{Data: make([]byte, messageMost-1000)}}}
	if n := len(appendBatch(nil, 1, announced(fits))); n > messageMost {
		t.Errorf("a message of %d bytes", n)
	}
}

// TestRedisBusOfAnotherVersion: a message that can't be read has the subscribers look at the log.
func TestRedisBusOfAnotherVersion(t *testing.T) {
	t.Parallel()
	server := redisserver.ForTest(t)
	b := openBus(t, server.URL())
	awaitWell(t, b, true)
	sub := b.Subscribe(t.Context())
	for _, message := range []string{"", "x", "\x02 of a later version of walgate", string(appendBatch(nil, 1, &Batch{History: "a1b2"})) + "more"} {
		before := b.stats.Unreadable.Load()
		if _, err := server.Do(t.Context(), "PUBLISH", b.channel, message); err != nil {
			t.Fatal(err)
		}
		awaitHints(t, sub, 1)
		if b.stats.Unreadable.Load() == before {
			t.Errorf("%q was read", message)
		}
	}
}

// TestRedisAddresses: every kind of Redis that redis.url may name carries batches.
func TestRedisAddresses(t *testing.T) {
	t.Parallel()
	cert, key := certificate(t)
	const user = "user ana on >secret ~walgate:* &walgate:* +publish +subscribe +unsubscribe +spublish +ssubscribe +sunsubscribe +ping"
	master := redisserver.StartForTest(t, redisserver.Options{})
	for name, c := range map[string]struct {
		settings []string
		sentinel bool
		url      func(addr string) string
		prepare  []string
		refused  bool
	}{
		"plain":            {url: func(a string) string { return "redis://" + a }},
		"database":         {url: func(a string) string { return "redis://" + a + "/3" }},
		"password":         {settings: []string{"requirepass secret"}, url: func(a string) string { return "redis://:secret@" + a }},
		"wrong password":   {settings: []string{"requirepass secret"}, url: func(a string) string { return "redis://:wrong@" + a }, refused: true},
		"ACL user":         {settings: []string{user}, url: func(a string) string { return "redis://ana:secret@" + a }},
		"ACL lacks rights": {settings: []string{"user ana on >secret ~walgate:* +ping +hello +client"}, url: func(a string) string { return "redis://ana:secret@" + a }, refused: true},
		"TLS":              {settings: []string{"port 0", "tls-port $PORT", "tls-cert-file " + cert, "tls-key-file " + key, "tls-auth-clients no", "tls-ca-cert-file " + cert}, url: func(a string) string { return "rediss://" + a + "?skip_verify=true" }},
		"TLS, not trusted": {settings: []string{"port 0", "tls-port $PORT", "tls-cert-file " + cert, "tls-key-file " + key, "tls-auth-clients no", "tls-ca-cert-file " + cert}, url: func(a string) string { return "rediss://" + a }, refused: true},
		"cluster":          {settings: []string{"cluster-enabled yes"}, prepare: []string{"CLUSTER", "ADDSLOTSRANGE", "0", "16383"}, url: func(a string) string { return "redis://" + a + "?cluster=true" }},
		"cluster's nodes":  {settings: []string{"cluster-enabled yes"}, prepare: []string{"CLUSTER", "ADDSLOTSRANGE", "0", "16383"}, url: func(a string) string { return "redis://" + a + "?addr=127.0.0.1:1" }},
		"sentinel":         {sentinel: true, settings: []string{"sentinel monitor main " + strings.ReplaceAll(master.Addr(), ":", " ") + " 1"}, url: func(a string) string { return "redis://" + a + "?master_name=main" }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := redisserver.StartForTest(t, redisserver.Options{Settings: c.settings, Sentinel: c.sentinel})
			if c.prepare != nil {
				if _, err := server.Do(t.Context(), c.prepare...); err != nil {
					t.Fatal(err)
				}
			}
			here, there := openBus(t, c.url(server.Addr())), openBus(t, c.url(server.Addr()))
			if c.refused {
				awaitThat(t, "it says why", func() bool { why, _ := here.redis.Down(); return why != "" })
				why, _ := here.redis.Down()
				if name == "wrong password" && !strings.Contains(why, "it refuses the user or password") || name == "ACL lacks rights" && !strings.Contains(why, "its ACL doesn't allow") {
					t.Errorf("it doesn't say what that means: %s", why)
				}
				if strings.Contains(why, "secret") || strings.Contains(why, "wrong") && !strings.Contains(why, "WRONGPASS") {
					t.Errorf("it tells the password: %s", why)
				}
				return
			}
			awaitWell(t, there, true)
			awaitWell(t, here, true)
			awaitBatch(t, here, there.Subscribe(t.Context()), &Batch{History: "a1b2", Last: 7})
			if strings.HasPrefix(name, "cluster") { // an ordinary channel would go to all nodes
				if channels, err := server.Do(t.Context(), "PUBSUB", "SHARDCHANNELS"); err != nil || !strings.Contains(channels, "walgate:") {
					t.Errorf("sharded channels: %q, %v", channels, err)
				}
			}
		})
	}
}

// TestSentinelFailsOver: sentinels promote a replica, and the bus goes on with it.
func TestSentinelFailsOver(t *testing.T) {
	t.Parallel()
	master := redisserver.StartForTest(t, redisserver.Options{})
	replicaOf := strings.ReplaceAll(master.Addr(), ":", " ")
	redisserver.StartForTest(t, redisserver.Options{Settings: []string{"replicaof " + replicaOf, "repl-diskless-sync-delay 0"}})
	sentinel := redisserver.StartForTest(t, redisserver.Options{Sentinel: true, Settings: []string{"sentinel monitor main " + replicaOf + " 1",
		"sentinel down-after-milliseconds main 300", "sentinel failover-timeout main 2000"}})
	url := "redis://" + sentinel.Addr() + "?master_name=main"
	here, there := openBus(t, url), openBus(t, url)
	awaitWell(t, here, true)
	awaitWell(t, there, true)
	awaitThat(t, "the sentinel knows the replica", func() bool {
		text, err := sentinel.Do(t.Context(), "SENTINEL", "REPLICAS", "main")
		return err == nil && strings.Contains(text, "master-link-status\nok")
	})
	sub := there.Subscribe(t.Context())
	if err := master.Kill(); err != nil {
		t.Fatal(err)
	}
	awaitThat(t, "the replica is promoted", func() bool {
		text, err := sentinel.Do(t.Context(), "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")
		return err == nil && strings.ReplaceAll(text, "\n", " ") != replicaOf
	})
	awaitBatch(t, here, sub, &Batch{History: "a1b2", Last: 7})
	awaitWell(t, here, true)
}

// TestChannelMovesInACluster: the node that has the channel ends the subscription and stays connected, as when the channel's slot
// moves to another node. The bus says so, and subscribes again once the slot is somewhere.
func TestChannelMovesInACluster(t *testing.T) {
	t.Parallel()
	server := redisserver.StartForTest(t, redisserver.Options{Settings: []string{"cluster-enabled yes"}})
	do := func(args ...string) {
		t.Helper()
		if _, err := server.Do(t.Context(), args...); err != nil {
			t.Fatal(err)
		}
	}
	do("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
	b := openBus(t, "redis://"+server.Addr()+"?cluster=true")
	awaitWell(t, b, true)
	began := b.stats.Subscribed.Load()
	do("CLUSTER", "DELSLOTSRANGE", "0", "16383")
	awaitWell(t, b, false)
	do("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
	awaitWell(t, b, true)
	if b.stats.Subscribed.Load() == began {
		t.Error("it didn't subscribe again")
	}
	awaitBatch(t, b, b.Subscribe(t.Context()), &Batch{History: "a1b2", Last: 7})
}

// TestRedisURLs: what can't be an address is refused without telling the password.
func TestRedisURLs(t *testing.T) {
	t.Parallel()
	for _, url := range []string{"", "localhost:6379", "http://h", "redis://u:secret@h:6379/x", "redis://u:secret@h:63%79", "redis://u:secret@h?nosuch=1", "redis://u:secret@h?addr=nohost", "redis://u:secret@h?addr=a:1&nosuch=1",
		"redis://u:secret@h?master_name=m&nosuch=1",
		"redis://user:12/34secret@h:6379/0", "redis://user:12?secret@h", "redis://user:12#secret@h"} {
		r, err := OpenRedis(RedisOptions{URL: url})
		if err == nil {
			t.Errorf("%s is taken", url)
			_ = r.Close()
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("it tells the password: %v", err)
		}
	}
}

// certificate makes a certificate for the loopback address that nobody trusts.
func certificate(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "redis"}, NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "EC PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}
