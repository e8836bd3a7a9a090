package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/gateway"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/replication"
	"github.com/walgate/walgate/schema"
)

// serve runs the gateway until ctx ends. ready, if not nil, gets the base URL once clients can connect.
//
// The goroutines, and how they stop: ctx ends → the gateway says goodbye to its clients and drains (gateway.Run, with the
// hub inside) → then replication stops: the stream stops receiving, the appender ends, the last status acknowledges what
// is logged (replication.Leader.Run), and the catalog's watch ends → then the pools close. A second signal ends the
// process. Killed at any point, it goes on from the log's checkpoint.
func serve(ctx context.Context, cfg *Config, logger *slog.Logger, ready chan<- string) error {
	why := toServe
	if cfg.AutoInit {
		why = toPrepare
	}
	p, err := open(ctx, cfg, why, logger)
	if err != nil {
		return err
	}
	defer p.close()
	if err := p.openBlobs(ctx, cfg, logger); err != nil {
		return err
	}
	if err := p.install(ctx, cfg, logger); err != nil {
		return err
	}
	if err := p.openFiles(ctx, cfg); err != nil {
		return err
	}
	if err := p.bindBlobs(ctx, cfg); err != nil {
		return err
	}
	auth, err := newAuthenticator(ctx, cfg, logger)
	if err != nil {
		return err
	}
	var stats replication.Stats
	bus, shared, err := p.openBus(ctx, cfg, logger)
	if err != nil {
		return err
	}
	if shared != nil {
		defer p.redis.Close()
	}
	leader := replication.NewLeader(replication.Options{
		Source: p.source, ReplicationURL: cfg.replicationURL(), Slot: cfg.Replication.Slot, Publications: p.publications,
		ConfigRevision: cfg.Revision, MaxSlotLag: int64(cfg.Limits.MaxSlotLag), PushRetention: cfg.Push.IdempotencyRetention, Log: p.log, Bus: bus, Watcher: p.watcher, Stats: &stats, Logger: logger,
	})
	options := gatewayOptions(cfg, p, bus, auth, &stats, logger)
	if shared != nil {
		options.Collectors = append(options.Collectors, redisMetrics{p.redis, shared.Stats()})
	}
	var attachments *careLoop
	if care := p.newCare(cfg, logger); care != nil {
		attachments = &careLoop{care: care, logger: logger}
		options.Collectors = append(options.Collectors, attachments)
	}
	gw := gateway.New(options)
	listener, scheme, err := listen(cfg)
	if err != nil {
		return err
	}
	logger.Info("serving", "listen", listener.Addr().String(), "version", version, "collections", len(cfg.Collections))
	if ready != nil {
		ready <- scheme + listener.Addr().String()
	}

	working, stopWorking := context.WithCancel(context.WithoutCancel(ctx)) // outlives the drain
	defer stopWorking()
	g, serving := errgroup.WithContext(ctx)
	g.Go(func() error { // clients: the hub and every session; waits for them
		defer stopWorking()
		return gw.Run(serving, listener)
	})
	g.Go(func() error { return leader.Run(working) })    // the slot: stream, appender, care
	g.Go(func() error { return p.watcher.Run(working) }) // the source's catalog
	if shared != nil {
		g.Go(func() error { return shared.Run(working) }) // what instances tell each other
	}
	if attachments != nil {
		g.Go(func() error { return attachments.run(serving) }) // files that no row needs; a round is cut off at any point
	}
	err = g.Wait()
	logger.Info("stopped")
	return err
}

// listen opens the server's address, with TLS where a certificate is configured.
func listen(cfg *Config) (l net.Listener, scheme string, err error) {
	scheme = "http://"
	var cert tls.Certificate
	if cfg.HTTP.TLS.CertFile != "" {
		scheme = "https://"
		if cert, err = tls.LoadX509KeyPair(cfg.HTTP.TLS.CertFile, cfg.HTTP.TLS.KeyFile); err != nil {
			return nil, "", fmt.Errorf("http.tls: %w", err)
		}
	}
	if l, err = net.Listen("tcp", cfg.HTTP.Listen); err != nil {
		return nil, "", fmt.Errorf("listen on http.listen: %w", err)
	}
	if scheme == "https://" {
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12})
	}
	return l, scheme, nil
}

// parts is what lives longer than the goroutines.
type parts struct {
	source       *pgxpool.Pool
	log          *changelog.Log
	watcher      *replication.Watcher
	publications schema.Publications
	blobs        *blobstore.Store   // nil: no collection has attachments
	files        *blobstore.Records // the same
	signingKey   []byte             // of download URLs
	redis        *changelog.Redis   // nil: none is configured
}

// open connects to the source and compiles the policies against it. It reports everything that is wrong at once.
func open(ctx context.Context, cfg *Config, why purpose, logger *slog.Logger) (*parts, error) {
	faults := checkServer(ctx, cfg, why, logger)
	p, more, err := openParts(ctx, cfg, why, logger)
	if faults = append(faults, more...); len(faults) > 0 {
		err = FaultsError(cfg, faults)
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func openParts(ctx context.Context, cfg *Config, why purpose, logger *slog.Logger) (*parts, []policies.Fault, error) {
	p := &parts{publications: schema.PublicationsFor(cfg.Replication.Publication)}
	var err error
	if p.source, err = schema.OpenPool(ctx, string(cfg.Database.URL), cfg.Database.PoolSize); err != nil {
		return p, notConnected("database.url", err), err
	}
	conn, err := p.source.Acquire(ctx)
	if err != nil {
		return p, notConnected("database.url", err), fmt.Errorf("connect to the source: %w", err)
	}
	defer conn.Release()
	if p.log, err = changelog.Open(ctx, cfg.storageURL(), cfg.Storage.PoolSize); err != nil {
		return p, notConnected("storage.url", err), err
	}
	p.watcher = replication.NewWatcher(p.source, p.publications, cfg.Collections, cfg.AutoInit, cfg.Catalog.PollInterval, logger)
	faults, err := p.watcher.Start(ctx)
	if err != nil || len(faults) > 0 || why == toPrint {
		return p, faults, err
	}
	faults, err = checkRights(ctx, conn.Conn(), cfg, p, why)
	return p, faults, err
}

func (p *parts) close() {
	if p.source != nil {
		p.source.Close()
	}
	if p.log != nil {
		p.log.Close()
	}
	if p.blobs != nil {
		_ = p.blobs.Close() // nothing is written through it any more
	}
}

// openBus makes the bus; shared is it too, where Redis carries it.
func (p *parts) openBus(ctx context.Context, cfg *Config, logger *slog.Logger) (bus changelog.Bus, shared *changelog.RedisBus, err error) {
	if cfg.Redis.URL == "" {
		return changelog.NewMemoryBus(), nil, nil
	}
	name, err := schema.Installation(ctx, p.source)
	if err != nil {
		return nil, nil, err
	}
	if p.redis, err = changelog.OpenRedis(changelog.RedisOptions{URL: string(cfg.Redis.URL), Namespace: name, Logger: logger}); err != nil {
		return nil, nil, fmt.Errorf("redis.url: %w", err)
	}
	shared = changelog.NewRedisBus(p.redis)
	return shared, shared, nil
}

// install checks that the source is prepared, or prepares it where auto_init allows.
func (p *parts) install(ctx context.Context, cfg *Config, logger *slog.Logger) error {
	if len(cfg.Collections) == 0 {
		logger.Warn("no collections are configured: nothing is synced")
	}
	if cfg.AutoInit {
		return initialise(ctx, cfg, p, logger) // a partition that is made right now joins with the next look at the catalog
	}
	conn, err := p.source.Acquire(ctx)
	if err != nil {
		return fmt.Errorf("connect to the source: %w", err)
	}
	defer conn.Release()
	pending, err := schema.PendingMigrations(ctx, conn)
	if err != nil {
		return err
	}
	d := p.watcher.Current()
	steps, err := replication.PlanFor(ctx, conn.Conn(), p.publications, d.Set, d.Catalog)
	if err != nil {
		return err
	}
	for _, name := range pending {
		err = errors.Join(err, errors.New("  walgate's own tables: "+name))
	}
	for _, s := range steps {
		err = errors.Join(err, errors.New("  "+s.What))
	}
	if err != nil {
		return fmt.Errorf("the source is not prepared; run walgate init (or set auto_init: true). Missing:\n%w", err)
	}
	return p.log.Migrate(ctx)
}

func newAuthenticator(ctx context.Context, cfg *Config, logger *slog.Logger) (*gateway.Authenticator, error) {
	a := gateway.AuthConfig{Secret: string(cfg.Auth.JWT.Secret), JWKSURL: cfg.Auth.JWT.JWKSURL, Issuer: cfg.Auth.JWT.Issuer,
		Audience: cfg.Auth.JWT.Audience, Leeway: cfg.Auth.JWT.Leeway, SubjectClaim: cfg.Auth.Claims.Subject, RolesClaim: cfg.Auth.Claims.Roles, ClientClaim: cfg.Auth.Claims.Client, Log: logger}
	if f := cfg.Auth.JWT.PublicKeyFile; f != "" {
		pem, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("auth.jwt.public_key_file: %w", err)
		}
		a.PublicKeyPEM = string(pem)
	}
	return gateway.NewAuthenticator(ctx, a, nil)
}

func gatewayOptions(cfg *Config, p *parts, bus changelog.Bus, auth *gateway.Authenticator, stats *replication.Stats, logger *slog.Logger) gateway.Options {
	return gateway.Options{
		Log: p.log, Bus: bus, Redis: p.redis, Source: p.source, Types: p.watcher.Types(), Auth: auth, Logger: logger,
		Policies:     p.policies,
		SourceStatus: func() gateway.SourceStatus { return sourceStatus(stats, p.watcher) },
		Fence:        func(ctx context.Context) (changelog.LSN, error) { return replication.Fence(ctx, p.source) },
		PublicURL:    cfg.HTTP.PublicURL, AllowedOrigins: cfg.HTTP.AllowedOrigins, TrustedProxies: cfg.HTTP.TrustedProxies,
		FrameLimit: int(cfg.Limits.Frame), RequestsPerSecond: cfg.Limits.RequestsPerSecond, Burst: cfg.Limits.Burst,
		StreamConnections: cfg.Limits.StreamConnections, StreamsPerSubject: cfg.Limits.StreamConnectionsPerSubject,
		FullConcurrency: min(cfg.Limits.FullConcurrency, max(1, (cfg.Database.PoolSize-4)/2)), // each holds a snapshot while it passes a fence
		Drain:           cfg.Limits.Drain, ReadersConcurrency: max(1, cfg.Storage.PoolSize-2), SendMemory: int64(cfg.Limits.SendMemory),
		PushBody: int(cfg.Limits.PushBody), PushRole: cfg.Push.Role, EchoTimeout: cfg.Push.EchoTimeout,
		PushConcurrency: max(1, (cfg.Database.PoolSize-4)/2), // as full resyncs: four connections are left for fences whatever both hold
		Blobs:           p.blobs, Files: p.files,
		ClientsKept: cfg.Push.IdempotencyRetention, AttachmentLimit: int64(cfg.Limits.Attachment), Quota: int64(cfg.Limits.Quota), AttachmentTypes: cfg.Attachments.Types,
		AttachmentReplace: cfg.Attachments.Replace, AttachmentDeleteRoles: cfg.Attachments.DeleteRoles, AttachmentURLTTL: cfg.Attachments.URLTTL,
		AttachmentSigningKey: p.signingKey, AttachmentDirect: cfg.Attachments.Direct, UploadTTL: cfg.Attachments.UploadTTL,
	}
}

func sourceStatus(s *replication.Stats, w *replication.Watcher) gateway.SourceStatus {
	leading, failure, slot := s.State()
	standby := ""
	if s.Standby() {
		standby, failure = failure, ""
	}
	fills := map[string]gateway.FillStatus{}
	for name, f := range s.Fills() {
		fills[name] = gateway.FillStatus{Rows: f.Rows, Estimate: f.Estimate, Done: f.Done}
	}
	return gateway.SourceStatus{
		Leading: leading, Err: failure, Standby: standby, Waiting: s.Waiting(), Received: changelog.LSN(s.Received.Load()), Logged: changelog.LSN(s.Logged.Load()),
		Acknowledged: changelog.LSN(s.Acknowledged.Load()), Transactions: s.Transactions.Load(), Rows: s.Rows.Load(),
		Reconnects: s.Reconnects.Load(), Histories: s.Histories.Load(), PolicyErrors: s.PolicyErrors.Load(), LastCommit: time.Unix(0, s.CommitNanos.Load()),
		LastHeard: time.Unix(0, s.WireNanos.Load()), QueueBytes: s.QueueBytes.Load(), SlotLag: slot.LagBytes, SlotSafe: slot.SafeBytes, LogRows: s.LogRows.Load(), SlotStatus: slot.Status,
		Stopped: w.Current().Stopped, Impaired: w.Current().Impaired, Fills: fills,
	}
}
