package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/walgate/walgate/gateway"
)

// usageError is a wrong command line.
type usageError struct{ error }

// newCommand makes the command line.
func newCommand() *cobra.Command {
	var path string
	root := &cobra.Command{
		Use: "walgate", Short: "Make a PostgreSQL application offline-first without touching its code",
		SilenceErrors: true, SilenceUsage: true, Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	def := os.Getenv("WALGATE_CONFIG")
	if def == "" {
		def = "config.yaml"
	}
	root.PersistentFlags().StringVar(&path, "config", def, "configuration file")
	load := func() (*Config, error) {
		cfg, err := Load(path, os.LookupEnv)
		var faults *ConfigError
		if err != nil && !errors.As(err, &faults) { // the file can't be read
			err = &usageError{err}
		}
		return cfg, err
	}
	root.AddCommand(serveCommand(load), initCommand(load), uninstallCommand(load), statusCommand(load), attachmentsCommand(load), tokenCommand(load),
		&cobra.Command{Use: "version", Short: "Print the version", Args: cobra.NoArgs, Run: func(c *cobra.Command, _ []string) {
			fmt.Fprintln(c.OutOrStdout(), version)
		}},
		newDemoCommand(demoServing, demoSigning), chaosCommand(&path))
	all := append(root.Commands(), root)
	for _, c := range root.Commands() {
		all = append(all, c.Commands()...)
	}
	for _, c := range all {
		if check := c.Args; check != nil {
			c.Args = func(c *cobra.Command, args []string) error {
				if err := check(c, args); err != nil {
					return &usageError{err}
				}
				return nil
			}
		}
	}
	return root
}

type loader func() (*Config, error)

func serveCommand(load loader) *cobra.Command {
	return &cobra.Command{Use: "serve", Short: "Tail the source and serve clients", Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error {
		cfg, err := load()
		if err != nil {
			return err
		}
		return serve(c.Context(), cfg, newLogger(cfg, c.ErrOrStderr()), nil)
	}}
}

func initCommand(load loader) *cobra.Command {
	var printOnly bool
	c := &cobra.Command{Use: "init", Short: "Prepare the source: publications, replica identities, slot, schema walgate", Args: cobra.NoArgs,
		Long: "init makes two publications, lets each synced table join (replica identity FULL, under a lock that waits for its\n" +
			"writers), makes the slot and walgate's own tables. It may be run again at any time; what is there stays.",
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := load()
			if err != nil {
				return err
			}
			logger := newLogger(cfg, c.ErrOrStderr())
			why := toPrepare
			if printOnly {
				why = toPrint
			}
			p, err := open(c.Context(), cfg, why, logger)
			if err != nil {
				return err
			}
			defer p.close()
			if printOnly {
				return printSQL(c.Context(), cfg, p, c.OutOrStdout())
			}
			return initialise(c.Context(), cfg, p, logger)
		}}
	c.Flags().BoolVar(&printOnly, "print-sql", false, "print the statements for a DBA instead of running them")
	return c
}

func uninstallCommand(load loader) *cobra.Command {
	var forgetFiles bool
	c := &cobra.Command{Use: "uninstall", Short: "Remove slot, publications and schema walgate, and restore replica identities", Args: cobra.NoArgs,
		Long: "uninstall removes what init and serve made: the slot, the publications, schema walgate with the change log, and the replica\n" +
			"identities. Stop every gateway first. The bytes of attachments stay in the blob store, but what is known of them goes.",
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := load()
			if err != nil {
				return err
			}
			return uninstall(c.Context(), cfg, forgetFiles, newLogger(cfg, c.ErrOrStderr()))
		}}
	c.Flags().BoolVar(&forgetFiles, "forget-files", false, "also where files of attachments are kept, which nobody can serve afterwards")
	return c
}

func tokenCommand(load loader) *cobra.Command {
	var sub string
	var roles, claims []string
	var ttl time.Duration
	c := &cobra.Command{Use: "token", Short: "Print a token signed with auth.jwt.secret, for trying things out", Args: cobra.NoArgs,
		Example: "  walgate token --sub ana --role editor --claim org_id=7 --claim 'teams=[1,2]' --ttl 1h",
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := load()
			if err != nil {
				return err
			}
			more, err := parseClaims(claims)
			if err != nil {
				return err
			}
			t, err := signToken(cfg, sub, roles, more, ttl)
			if err != nil {
				return err
			}
			fmt.Fprintln(c.OutOrStdout(), t)
			return nil
		}}
	c.Flags().StringVar(&sub, "sub", "", "subject: who the token is for (required)")
	c.Flags().StringArrayVar(&roles, "role", nil, "a role; may be repeated")
	c.Flags().StringArrayVar(&claims, "claim", nil, "name=value; the value is JSON where it parses as such, else a string; may be repeated")
	c.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long the token is valid")
	return c
}

// parseClaims reads name=value pairs.
func parseClaims(pairs []string) (map[string]any, error) {
	out := map[string]any{}
	for _, p := range pairs {
		name, text, ok := strings.Cut(p, "=")
		if !ok || name == "" {
			return nil, &usageError{fmt.Errorf("--claim %q: want name=value", p)}
		}
		d := json.NewDecoder(strings.NewReader(text))
		d.UseNumber()
		var v any
		if err := d.Decode(&v); err != nil || d.More() {
			v = text
		}
		out[name] = v
	}
	return out, nil
}

func signToken(cfg *Config, sub string, roles []string, claims map[string]any, ttl time.Duration) (string, error) {
	if sub == "" {
		return "", &usageError{fmt.Errorf("--sub is required")}
	}
	if ttl <= 0 {
		return "", &usageError{fmt.Errorf("--ttl must be above zero")}
	}
	if cfg.Auth.JWT.Secret == "" {
		return "", &usageError{fmt.Errorf("tokens can be signed only where auth.jwt.secret is configured")}
	}
	now := time.Now()
	all := map[string]any{}
	for k, v := range claims {
		all[k] = v
	}
	all["iat"], all["exp"] = now.Unix(), now.Add(ttl).Unix()
	setClaim(all, cfg.Auth.Claims.Subject, sub)
	if len(roles) > 0 {
		setClaim(all, cfg.Auth.Claims.Roles, roles)
	}
	if cfg.Auth.JWT.Issuer != "" {
		all["iss"] = cfg.Auth.JWT.Issuer
	}
	if cfg.Auth.JWT.Audience != "" {
		all["aud"] = cfg.Auth.JWT.Audience
	}
	return gateway.SignHS256(string(cfg.Auth.JWT.Secret), all)
}

// setClaim sets a claim at a dotted path.
func setClaim(claims map[string]any, path string, v any) {
	parts := strings.Split(path, ".")
	for _, p := range parts[:len(parts)-1] {
		next, ok := claims[p].(map[string]any)
		if !ok {
			next = map[string]any{}
			claims[p] = next
		}
		claims = next
	}
	claims[parts[len(parts)-1]] = v
}

// newLogger writes to w as log.format says.
func newLogger(cfg *Config, w io.Writer) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.Log.Level)); err != nil {
		level = slog.LevelInfo // Load has checked it
	}
	o := &slog.HandlerOptions{Level: level}
	if cfg.Log.Format == "text" {
		return slog.New(slog.NewTextHandler(w, o))
	}
	return slog.New(slog.NewJSONHandler(w, o))
}

// demoServing and demoSigning are what the demo needs of the rest.
func demoServing(ctx context.Context, path string, ready chan<- string) error {
	cfg, err := Load(path, func(string) (string, bool) { return "", false })
	if err != nil {
		return err
	}
	cfg.Log.Level = "warn"
	return serve(ctx, cfg, newLogger(cfg, os.Stderr), ready)
}

func demoSigning(path, sub string, roles []string, claims map[string]any) (string, error) {
	cfg, err := Load(path, func(string) (string, bool) { return "", false })
	if err != nil {
		return "", err
	}
	return signToken(cfg, sub, roles, claims, 24*time.Hour)
}
