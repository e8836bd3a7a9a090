package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/walgate/walgate/policies"
)

// twin is the environment variable that stands for a key.
func twin(path string) string {
	return "WALGATE_" + strings.ToUpper(strings.ReplaceAll(path, ".", "_"))
}

// environment sets the keys whose twins are set.
func (d *decoder) environment(keys []key) {
	for _, k := range keys {
		text, ok := d.env(twin(k.path))
		if !ok {
			continue
		}
		at := mark{variable: twin(k.path)}
		d.positions[k.path] = at
		if want := k.set(text); want != "" {
			got := quote(text)
			if k.hidden() {
				got = "a value (not shown)"
			}
			d.fault(at, k.path, got, want, "")
		}
	}
}

// defaults fills in what neither file nor environment names and must be there.
func (d *decoder) defaults(keys []key) {
	for _, k := range keys {
		into, ok := k.into.(*DSN)
		if !ok || !k.required || slices.Contains(d.bad, k.path) {
			continue
		}
		if string(*into) == defaultDatabaseURL {
			text, problem := expand(defaultDatabaseURL, d.env)
			if problem != "" {
				text = ""
			}
			if want := k.set(text); want != "" {
				d.fault(mark{variable: "DATABASE_URL"}, k.path, "a value (not shown)", want, "")
				continue
			}
		}
		if *into == "" {
			d.fault(d.where(k.path), k.path, "nothing", "the application's PostgreSQL, such as postgres://user@host:5432/db",
				"set it in the file, or set DATABASE_URL or "+twin(k.path))
		}
	}
}

// checkTogether holds the rules that concern more than one key.
func (d *decoder) checkTogether(c *Config) {
	d.checkKeySource(c.Auth.JWT)
	if tls := c.HTTP.TLS; (tls.CertFile == "") != (tls.KeyFile == "") {
		d.fault(d.where("http.tls"), "http.tls", "one of cert_file and key_file", "both or neither", "")
	}
	if slices.Contains(c.HTTP.AllowedOrigins, "*") && len(c.HTTP.AllowedOrigins) > 1 {
		d.fault(d.where("http.allowed_origins"), "http.allowed_origins", `"*" beside other origins`, `"*" alone or a list of origins`, "")
	}
	d.checkQuota(c.Limits)
	if c.Limits.StreamConnectionsPerSubject > c.Limits.StreamConnections {
		const path = "limits.stream_connections_per_subject"
		d.fault(d.where(path), path, fmt.Sprint(c.Limits.StreamConnectionsPerSubject),
			fmt.Sprintf("no more than limits.stream_connections, which is %d", c.Limits.StreamConnections), "")
	}
}

func (d *decoder) checkKeySource(jwt JWTConfig) {
	var named []string
	broken := false
	for _, source := range []struct{ name, value string }{
		{"secret", string(jwt.Secret)}, {"public_key_file", jwt.PublicKeyFile}, {"jwks_url", jwt.JWKSURL},
	} {
		if source.value != "" {
			named = append(named, source.name)
		}
		broken = broken || slices.Contains(d.bad, "auth.jwt."+source.name)
	}
	const want = "exactly one of secret, public_key_file and jwks_url"
	switch {
	case len(named) == 1 || len(named) == 0 && broken:
	case len(named) == 0:
		d.fault(d.where("auth.jwt"), "auth.jwt", "no key to verify tokens with", want, "openssl rand -base64 48 makes a secret")
	default:
		d.fault(d.where("auth.jwt"), "auth.jwt", strings.Join(named, " and "), want, "")
	}
}

var (
	collectionPattern = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_-]{0,62}$`)
	tablePattern      = regexp.MustCompile(`^[^.\x00]+(\.[^.\x00]+)?$`)
)

func checkTable(text string) string {
	if tablePattern.MatchString(text) {
		return ""
	}
	return "a table as schema.name, such as public.tasks"
}

// specKeys lists the plain keys of one collection.
func specKeys(path string, s *policies.Spec) []key {
	return []key{
		{path: path + ".table", into: &s.Table, check: checkTable},
		{path: path + ".columns.exclude", into: &s.Columns.Exclude, nonEmpty: true},
		{path: path + ".where", into: &s.Where, nonEmpty: true},
		{path: path + ".read.roles", into: &s.Read.Roles, nonEmpty: true},
		{path: path + ".soft_delete.column", into: &s.SoftDelete, nonEmpty: true},
		{path: path + ".lossless", into: &s.Lossless},
		{path: path + ".replica_identity", into: &s.ReplicaIdentity, words: []string{"full", "default"}},
		{path: path + ".retention", into: &s.Retention, min: int64(time.Second), max: int64(maxRetention)},
		{path: path + ".on_deleted", into: &s.OnDeleted, words: policies.DeletePolicies},
	}
}

func (d *decoder) collections(path string, n ast.Node) map[string]policies.Spec {
	specs := map[string]policies.Spec{}
	for _, e := range d.entries(n, path) {
		at := path + "." + e.name
		if !collectionPattern.MatchString(e.name) {
			d.fault(e.at, at, quote(e.name), "a collection's name of 1 to 63 letters, digits, _ and -", "")
			continue
		}
		var s policies.Spec
		d.mapping(e.value, at+".", specKeys(at, &s), map[string]func(string, ast.Node){
			at + ".scope":       func(path string, n ast.Node) { s.Scope = d.scope(path, n) },
			at + ".write":       func(path string, n ast.Node) { s.Write = d.write(path, n) },
			at + ".conflict":    func(path string, n ast.Node) { d.conflict(path, n, &s) },
			at + ".attachments": func(path string, n ast.Node) { s.Attachments = d.specAttachments(path, n) },
		})
		d.checkSpec(at, e.at)
		specs[e.name] = s
	}
	return specs
}

// checkSpec refuses a collection without a table, and a section that is written but says nothing: an empty read or
// columns section is more likely a slip that would show rows to everybody than a wish.
func (d *decoder) checkSpec(path string, at mark) {
	if _, ok := d.positions[path+".table"]; !ok {
		d.fault(at, path+".table", "nothing", "the table to sync, such as public.tasks", "")
	}
	for _, section := range []struct{ name, key string }{{"columns", "exclude"}, {"read", "roles"}, {"soft_delete", "column"}} {
		full := path + "." + section.name
		_, written := d.positions[full]
		_, filled := d.positions[full+"."+section.key]
		if written && !filled && !d.badWithin(full) {
			d.fault(d.positions[full], full, "nothing", section.key, "leave "+section.name+" out where nothing is meant")
		}
	}
}

func (d *decoder) badWithin(path string) bool {
	return slices.ContainsFunc(d.bad, func(key string) bool { return key == path || strings.HasPrefix(key, path+".") })
}

// scope decodes one map of column to claim, or a list of them.
func (d *decoder) scope(path string, n ast.Node) []map[string]string {
	seq, isList := n.(*ast.SequenceNode)
	if !isList {
		if alternative := d.alternative(path, n, everybodyHint); alternative != nil {
			return []map[string]string{alternative}
		}
		return nil
	}
	if len(seq.Values) == 0 {
		d.fault(nodeMark(n), path, "an empty list", "at least one map of column to claim", everybodyHint)
	}
	var alternatives []map[string]string
	for i, item := range seq.Values {
		at := path
		if len(seq.Values) > 1 { // a list of one reads like the map alone, as policies names its faults
			at = fmt.Sprintf("%s.%d", path, i)
			d.positions[at] = nodeMark(item)
		}
		if alternative := d.alternative(at, item, everybodyHint); alternative != nil {
			alternatives = append(alternatives, alternative)
		}
	}
	return alternatives
}

const everybodyHint = "leave scope out where everybody may see every row"

// alternative decodes a map of column to claim; whenEmpty is the hint where it has none.
func (d *decoder) alternative(path string, n ast.Node, whenEmpty string) map[string]string {
	entries := d.entries(n, path)
	if len(entries) == 0 {
		if !d.badWithin(path) {
			d.fault(nodeMark(n), path, "no columns", "a map of column to claim, such as {owner_id: claims.sub}", whenEmpty)
		}
		return nil
	}
	alternative := map[string]string{}
	for _, e := range entries {
		k := key{path: path + "." + e.name, into: new(string), nonEmpty: true}
		text, ok := d.scalar(k, k.path, e.value)
		if !ok {
			continue
		}
		if want := k.set(text); want != "" {
			d.fault(nodeMark(e.value), k.path, quote(text), "a claim such as claims.sub", "")
			continue
		}
		alternative[e.name] = text
	}
	return alternative
}

// nearest returns the known name that a typing slip would turn into name, or "".
func nearest(name string, known []string) string {
	best, bestDistance := "", max(len(name)/3, 1)+1
	for _, candidate := range known {
		if distance := editDistance(strings.ToLower(name), candidate); distance < bestDistance {
			best, bestDistance = candidate, distance
		}
	}
	return best
}

// editDistance counts the insertions, deletions, replacements and swaps of neighbours between two names.
func editDistance(a, b string) int {
	if len(a) > 64 {
		return len(a) // no key is as long, and the input is not ours
	}
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before, last, row = last, row, before
		row[0] = i + 1
		for j := range len(b) {
			substitute := last[j]
			if a[i] != b[j] {
				substitute++
			}
			row[j+1] = min(substitute, last[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
	}
	return row[len(b)]
}
