package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func statusCommand(load loader) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{Use: "status", Short: "Say whether the source, the slot and the change log are well, and what to do where not", Args: cobra.NoArgs,
		Long: "status looks at the source, the slot, the change log and the collections, and changes nothing. It needs the configuration of\n" +
			"serve and no running gateway. Each line is ok, a warning, or wrong; the latter two say what that means and what to do next.\n" +
			"The exit status is 0 where nothing is wrong, 1 where something is, 2 for a wrong command line or configuration.",
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := load()
			if err != nil {
				return err
			}
			s := readStatus(c.Context(), cfg)
			if asJSON {
				err = s.writeJSON(c.OutOrStdout())
			} else {
				s.print(c.OutOrStdout())
			}
			if err == nil && len(s.Wrong) > 0 {
				err = fmt.Errorf("wrong: %s", strings.Join(s.Wrong, ", "))
			}
			return err
		}}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON for programs")
	return c
}

// How a line of the status is.
const (
	statusOK      = "ok"
	statusWarning = "warning"
	statusWrong   = "wrong"
)

// statusLine is one thing that was looked at.
type statusLine struct {
	Name  string `json:"name"`
	Level string `json:"level"`
	Says  string `json:"says"`
	Means string `json:"means"` // empty where all is well
	Next  string `json:"next"`
}

// status is all that was found. Members are added in later versions, none is renamed or left out.
type status struct {
	Well        bool               `json:"well"`
	Wrong       []string           `json:"wrong"` // names of lines
	Warnings    []string           `json:"warnings"`
	Lines       []statusLine       `json:"lines"`
	Source      *statusSource      `json:"source"` // null where it can't be read; so are the others
	Slot        *statusSlot        `json:"slot"`
	Log         *statusLog         `json:"log"`
	Collections []statusCollection `json:"collections"`
	Redis       *statusRedis       `json:"redis"`       // null also where none is configured
	Attachments *statusAttachments `json:"attachments"` // null also where no collection has any
}

func (s *status) add(level, name, says, means, next string) {
	s.Lines = append(s.Lines, statusLine{name, level, says, means, next})
	switch level {
	case statusWrong:
		s.Wrong = append(s.Wrong, name)
	case statusWarning:
		s.Warnings = append(s.Warnings, name)
	}
}

func (s *status) ok(name, format string, args ...any) {
	s.add(statusOK, name, fmt.Sprintf(format, args...), "", "")
}

// statusTimeout bounds the look at each of the databases.
const statusTimeout = 15 * time.Second

func readStatus(ctx context.Context, cfg *Config) *status {
	s := &status{Wrong: []string{}, Warnings: []string{}, Collections: []statusCollection{}}
	look := func(f func(context.Context, *Config)) {
		ctx, cancel := context.WithTimeout(ctx, statusTimeout)
		defer cancel()
		f(ctx, cfg)
	}
	look(s.readSource)
	look(s.readLog)
	look(s.readCollections)
	if cfg.Redis.URL != "" {
		look(s.readRedis)
	}
	if cfg.hasAttachments() {
		look(s.readAttachments)
	}
	s.Well = len(s.Wrong) == 0
	return s
}

func (s *status) writeJSON(out io.Writer) error {
	e := json.NewEncoder(out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(s)
}

func (s *status) print(out io.Writer) {
	wide := 0
	for _, l := range s.Lines {
		wide = max(wide, len(l.Name))
	}
	for _, l := range s.Lines {
		level := l.Level
		if level == statusWrong {
			level = "WRONG"
		}
		fmt.Fprintf(out, "%-8s %-*s  %s\n", level, wide, l.Name, l.Says)
		if l.Means != "" {
			fmt.Fprintf(out, "%-8s %-*s  means: %s\n", "", wide, "", l.Means)
		}
		if l.Next != "" {
			fmt.Fprintf(out, "%-8s %-*s  next:  %s\n", "", wide, "", l.Next)
		}
	}
	switch {
	case len(s.Wrong) > 0:
		fmt.Fprintf(out, "\n%d of %d lines are wrong: %s\n", len(s.Wrong), len(s.Lines), strings.Join(s.Wrong, ", "))
	case len(s.Warnings) > 0:
		fmt.Fprintf(out, "\nNothing is wrong; %d warnings: %s\n", len(s.Warnings), strings.Join(s.Warnings, ", "))
	default:
		fmt.Fprint(out, "\nAll is well.\n")
	}
}
