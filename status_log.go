package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/replication"
	"github.com/walgate/walgate/schema"
)

// statusLog is the change log.
type statusLog struct {
	History        string  `json:"history"`
	Version        string  `json:"version"`
	Floor          string  `json:"floor"`
	LSN            string  `json:"lsn"`
	AgeSeconds     float64 `json:"age_seconds"`
	Epoch          int64   `json:"epoch"`
	ConfigRevision int64   `json:"config_revision"`
	Bytes          int64   `json:"bytes"`
	head           *changelog.Head
}

// statusCollection is one collection.
type statusCollection struct {
	Name        string `json:"name"`
	State       string `json:"state"` // well, impaired, stopped, other policy, not logged
	Reason      string `json:"reason"`
	Floor       string `json:"floor"`
	FloorReason string `json:"floor_reason"`
}

// statusAttachments is what is known of files.
type statusAttachments struct {
	Uploaded     int64  `json:"uploaded"`
	Missing      int64  `json:"missing"`
	Unreferenced int64  `json:"unreferenced"`
	Deleted      int64  `json:"deleted"`
	Bytes        int64  `json:"bytes"`
	Unfilled     string `json:"unfilled"` // why not every row that names a file is known; empty: all are
}

func (s *status) readLog(ctx context.Context, cfg *Config) {
	const name = "change log"
	log, err := changelog.Open(ctx, cfg.storageURL(), 2)
	var v *changelog.Status
	if err == nil {
		defer log.Close()
		v, err = log.Status(ctx)
	}
	switch {
	case errors.Is(err, changelog.ErrNotInitialised):
		s.add(statusWrong, name, "has not begun", "no instance has led yet: clients get 503", "let walgate serve run, and see what it logs")
		return
	case err != nil:
		s.add(statusWrong, name, "can't be read: "+changelog.Explain(err).Error(), "clients get 503 or nothing new, and the source keeps its WAL on disk meanwhile",
			"see that the database of storage.url (or else database.url) runs, and that host, port and password are right")
		return
	}
	s.Log = &statusLog{History: v.History, Version: v.Version.Text(v.History), Floor: v.Floor.Text(v.History), LSN: v.LSN.String(), AgeSeconds: v.Age.Seconds(), Epoch: v.Epoch,
		ConfigRevision: v.ConfigRevision, Bytes: v.Bytes, head: &v.Head}
	says := fmt.Sprintf("history %s up to version %s (%s), written %s ago, epoch %d, %s", v.History, s.Log.Version, v.LSN, v.Age.Round(time.Second), v.Epoch, bytesText(v.Bytes))
	const anew = "with the next takeover a new history begins, and every client resynchronises in full"
	switch {
	case s.Source != nil && s.Source.System != "" && (changelog.Server{System: s.Source.System, Timeline: s.Source.Timeline}) != v.Source:
		s.add(statusWrong, name, says+"; it follows another server or timeline than database.url leads to", anew, "if the source failed over or was restored, wait for a leader; else correct database.url")
	case v.Now != v.Storage:
		s.add(statusWrong, name, says+"; its server or timeline isn't the one that it was written on", anew, "if it failed over or was restored, wait for a leader; else correct storage.url")
	default:
		s.ok(name, "%s", says)
	}
	const revision = "config_revision"
	switch {
	case cfg.Revision < v.ConfigRevision:
		s.add(statusWrong, revision, fmt.Sprintf("%d in %s, %d in the change log", cfg.Revision, cfg.path, v.ConfigRevision), "instances with this configuration can't lead", "deploy the newer configuration here")
	case cfg.Revision > v.ConfigRevision:
		s.add(statusWarning, revision, fmt.Sprintf("%d in %s, %d in the change log", cfg.Revision, cfg.path, v.ConfigRevision), "no instance with this configuration has led yet", "restart the leader with it")
	default:
		s.ok(revision, "%d", cfg.Revision)
	}
}

func (s *status) readCollections(ctx context.Context, cfg *Config) {
	if s.Source == nil || s.Source.Standby {
		return
	}
	pool, err := schema.OpenPool(ctx, string(cfg.Database.URL), 2)
	if err != nil {
		s.add(statusWrong, "collections", err.Error(), "whether they are well isn't known", "run walgate status again")
		return
	}
	defer pool.Close()
	w := replication.NewWatcher(pool, schema.PublicationsFor(cfg.Replication.Publication), cfg.Collections, false, time.Hour, newLogger(&Config{Log: LogConfig{Level: "error"}}, io.Discard))
	if err := w.Look(ctx); err != nil {
		s.add(statusWrong, "collections", err.Error(), "whether they are well isn't known", "run walgate status again")
		return
	}
	d := w.Current()
	names := make([]string, 0, len(cfg.Collections))
	for name := range cfg.Collections {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		c := statusCollection{Name: name, State: "well", Reason: d.Stopped[name]}
		line, level, means, next := "collection "+name, statusOK, "", ""
		var stored *changelog.Collection
		if s.Log != nil {
			for i := range s.Log.head.Collections {
				if h := &s.Log.head.Collections[i]; h.Name == name {
					stored = h
					c.Floor, c.FloorReason = h.Floor.Text(s.Log.History), h.FloorReason
				}
			}
		}
		switch now := d.Set.ByName(name); {
		case c.Reason != "" || stored != nil && stored.Stopped != "":
			c.State, level = "stopped", statusWrong
			c.Reason = cmp.Or(c.Reason, stoppedWhy(stored))
			means, next = "its requests answer 503; once it goes on, its clients resynchronise", "do what the reason says; the other collections are served meanwhile"
		case stored == nil && s.Log == nil:
			c.State, c.Reason = "not logged", "the change log can't be read"
		case stored == nil || stored.FloorReason == "not configured":
			c.State, c.Reason, level = "not logged", "no instance with this configuration has led yet", statusWarning
			means, next = "its requests answer 503", "restart the leader with this configuration, and a raised config_revision"
		case now != nil && now.Fingerprint != stored.Fingerprint:
			c.State, c.Reason, level = "other policy", "the change log follows another version of its policy than this configuration has", statusWarning
			means, next = "instances with this configuration answer 503 for it until one of them leads", "restart every instance with the same configuration, its config_revision raised"
		case d.Impaired[name] != "":
			c.State, c.Reason, level = "impaired", d.Impaired[name], statusWrong
			means, next = "changes flow, but not all requests succeed", "do what the reason says"
		}
		says := c.State
		if c.Reason != "" {
			says += ": " + c.Reason
		}
		if c.FloorReason != "" {
			says += fmt.Sprintf("; continues from %s (%s)", c.Floor, c.FloorReason)
		}
		s.Collections = append(s.Collections, c)
		s.add(level, line, says, means, next)
	}
}

func stoppedWhy(c *changelog.Collection) string {
	if c == nil {
		return ""
	}
	return c.Stopped
}

func (s *status) readAttachments(ctx context.Context, cfg *Config) {
	const name = "attachments"
	if s.Source == nil || s.Source.Standby || s.Log == nil {
		return
	}
	pool, err := schema.OpenPool(ctx, string(cfg.Database.URL), 2)
	var care *blobstore.CareStatus
	if err == nil {
		defer pool.Close()
		care, err = blobstore.NewCare(blobstore.CareOptions{Source: pool}).Status(ctx)
	}
	if err != nil {
		s.add(statusWarning, name, "their records can't be read: "+err.Error(), "their state isn't known", "let walgate serve run once with attachments configured")
		return
	}
	v := &statusAttachments{Uploaded: care.Uploaded.Files, Missing: care.Missing.Files, Unreferenced: care.Unreferenced.Files, Deleted: care.Deleted.Files, Bytes: care.Uploaded.Bytes}
	s.Attachments = v
	says := fmt.Sprintf("%d files (%s), %d missing, %d that no row names, %d deleted whose bytes are yet to go", v.Uploaded, bytesText(v.Bytes), v.Missing, v.Unreferenced, v.Deleted)
	switch held := care.Result.HeldUp(); {
	case care.GuardTripped():
		s.add(statusWrong, name, says+"; the guard stopped the last round: "+held[0].Why, "suspiciously many files would go, so none did", held[0].Next)
	case v.Missing > 0:
		s.add(statusWrong, name, says, "the blob store lost bytes; devices keep their copies and nobody is sent for them", "restore the blob store; files whose bytes are back are served again")
	case len(held) > 0:
		s.add(statusWarning, name, says+"; not done: "+held[0].What, held[0].Why, held[0].Next)
	default:
		s.ok(name, "%s", says)
	}
}
