package chaos

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/walgate/walgate/policies"
)

// secret signs the tokens of the runs. It protects nothing.
const secret = "0123456789abcdef0123456789abcdef"

// signToken makes a token as the application's own login would.
func signToken(subject string, roles []string, claims map[string]any) string {
	all := map[string]any{}
	for name, v := range claims {
		all[name] = v
	}
	all["sub"] = subject
	if len(roles) > 0 {
		all["roles"] = roles
	}
	all["iat"], all["exp"] = time.Now().Unix(), time.Now().Add(24*time.Hour).Unix()
	body, err := json.Marshal(all)
	if err != nil {
		panic(err) // claims came from JSON
	}
	text := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + base64.RawURLEncoding.EncodeToString(body)
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(text))
	return text + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

type object = map[string]any

// writeConfig writes the gateway's configuration, as JSON, which is YAML.
func (i *instance) writeConfig(c object) error {
	c["config_revision"] = i.revision
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(c); err != nil {
		return err
	}
	literal := strings.ReplaceAll(text.String(), "${", "$${") // no text of ours means the environment
	return os.WriteFile(i.config, []byte(literal), 0o600)
}

// baseConfig is what the gateways of every run have in common.
func baseConfig(collections map[string]policies.Spec, blobs string) object {
	return object{
		"auto_init":   true,
		"catalog":     object{"poll_interval": "300ms"},
		"limits":      object{"drain": "3s", "requests_per_second": 100000, "burst": 100000, "stream_connections_per_subject": 1000},
		"auth":        object{"jwt": object{"secret": secret}},
		"log":         object{"format": "text"},
		"blobs":       object{"url": "file://" + blobs},
		"attachments": object{"grace": "2s", "upload_ttl": "2s", "sweep_guard": 100},
		"collections": collectionsConfig(collections),
	}
}

// collectionsConfig says policies as a configuration does.
func collectionsConfig(specs map[string]policies.Spec) object {
	all := object{}
	for name, s := range specs {
		c := object{"table": s.Table}
		put := func(key string, v any, there bool) {
			if there {
				c[key] = v
			}
		}
		put("columns", object{"exclude": s.Columns.Exclude}, len(s.Columns.Exclude) > 0)
		put("scope", s.Scope, len(s.Scope) > 0)
		put("where", s.Where, s.Where != "")
		put("read", object{"roles": s.Read.Roles}, len(s.Read.Roles) > 0)
		put("soft_delete", object{"column": s.SoftDelete}, s.SoftDelete != "")
		put("lossless", true, s.Lossless)
		put("replica_identity", s.ReplicaIdentity, s.ReplicaIdentity != "")
		put("retention", s.Retention.String(), s.Retention > 0)
		put("conflict", s.Conflict, s.Conflict != "")
		put("conflict", object{"function": s.ConflictFunction}, s.ConflictFunction != "")
		put("on_deleted", s.OnDeleted, s.OnDeleted != "")
		if s.Write != nil {
			c["write"] = writeRule(s.Write)
		}
		var columns []object
		for _, a := range s.Attachments {
			columns = append(columns, attachmentRule(a))
		}
		put("attachments", columns, columns != nil)
		all[name] = c
	}
	return all
}

func writeRule(w *policies.WriteSpec) object {
	rule := object{}
	for key, list := range map[string][]string{"roles": w.Roles, "operations": w.Operations, "columns": w.Columns} {
		if len(list) > 0 {
			rule[key] = list
		}
	}
	if len(w.Set) > 0 {
		rule["set"] = w.Set
	}
	if w.Check != "" {
		rule["check"] = w.Check
	}
	return rule
}

func attachmentRule(a policies.AttachmentSpec) object {
	rule := object{"column": a.Column}
	if a.Path != "" {
		rule["path"] = a.Path
	}
	if a.Pattern != "" {
		rule["pattern"] = a.Pattern
	}
	return rule
}

// networkConfig is where a gateway listens and which ways it takes.
func (r *run) networkConfig(i *instance, port int) (object, error) {
	c := baseConfig(r.stack.o.Collections, r.blobs)
	application, err := i.source.Through(r.source.DSN(database))
	if err != nil {
		return nil, err
	}
	replication, err := i.replication.Through(r.source.DSN(database))
	if err != nil {
		return nil, err
	}
	storage, err := i.storage.Through(r.storage().DSN(r.logDatabase))
	if err != nil {
		return nil, err
	}
	c["database"] = object{"url": application, "replication_url": replication, "pool_size": 10}
	c["storage"] = object{"url": storage, "pool_size": 10}
	c["http"] = object{"listen": fmt.Sprintf("127.0.0.1:%d", port), "public_url": r.balancerURL()}
	if i.redis != nil {
		through, err := i.redis.Through(r.stack.redis.URL())
		if err != nil {
			return nil, err
		}
		c["redis"] = object{"url": through}
	}
	return c, nil
}

// reconfigure writes the configuration anew, for the next start.
func (r *run) reconfigure(i *instance) error {
	text, err := os.ReadFile(i.config)
	if err != nil {
		return err
	}
	var c object
	if err := json.Unmarshal(text, &c); err != nil {
		return err
	}
	c["config_revision"] = i.revision
	if text, err = json.MarshalIndent(c, "", "  "); err != nil {
		return err
	}
	return os.WriteFile(i.config, text, 0o600)
}
