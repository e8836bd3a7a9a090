package main

import (
	"context"

	"github.com/walgate/walgate/schema"
)

// hasAttachments says whether rows of any collection name attachments.
func (c *Config) hasAttachments() bool {
	for _, spec := range c.Collections {
		if spec.Attachments != nil {
			return true
		}
	}
	return false
}

// openAttachments reads what serving attachments takes, if any collection has them.
func (p *parts) openAttachments(ctx context.Context, cfg *Config) (err error) {
	if !cfg.hasAttachments() {
		return nil
	}
	if p.signingKey = []byte(cfg.Attachments.SigningKey); len(p.signingKey) == 0 {
		p.signingKey, err = schema.SigningKey(ctx, p.source)
	}
	return err
}
