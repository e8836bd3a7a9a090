package main

import (
	"errors"
	"fmt"
	"github.com/walgate/walgate/changelog"
	"math"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// set stores a text in the key's field. It returns what was expected instead, or "" where the text is right.
func (k key) set(text string) string {
	switch into := k.into.(type) {
	case *bool:
		if text != "true" && text != "false" {
			return "true or false"
		}
		*into = text == "true"
		return ""
	case *int:
		return setNumber(k, into, text, parseWhole, strconv.FormatInt, "a whole number")
	case *int64:
		return setNumber(k, into, text, parseWhole, strconv.FormatInt, "a whole number")
	case *Size:
		return setNumber(k, into, text, parseSize, formatSize, "a size such as 64KB, 16MB or 8GB")
	case *time.Duration:
		return setNumber(k, into, text, parseDuration, formatDuration, "a duration such as 500ms, 30s, 15m, 24h or 30d")
	case *[]string:
		*into = splitList(text)
		return k.checkAll(*into)
	case *string:
		*into = text
	case *Secret:
		*into = Secret(text)
	case *DSN:
		*into = DSN(text)
	}
	return k.checkText(text)
}

func (k key) checkText(text string) string {
	if k.nonEmpty && text == "" {
		return "some text; leave the key out where nothing is meant"
	}
	if k.words != nil && !slices.Contains(k.words, text) {
		return strings.Join(k.words[:len(k.words)-1], ", ") + " or " + k.words[len(k.words)-1]
	}
	if k.check == nil {
		return ""
	}
	return k.check(text)
}

func (k key) checkAll(list []string) string {
	if k.nonEmpty && len(list) == 0 {
		return "at least one entry; leave the key out where nothing is meant"
	}
	for _, text := range list {
		if want := k.checkText(text); want != "" {
			return want
		}
	}
	return ""
}

// wantType says what kind of value the key takes.
func (k key) wantType() string {
	switch k.into.(type) {
	case *bool:
		return "true or false"
	case *int, *int64:
		return "a whole number"
	case *Size:
		return "a size such as 8GB"
	case *time.Duration:
		return "a duration such as 30s"
	case *[]string:
		return "a list"
	default:
		return "text"
	}
}

// hidden tells whether the key's value must not be repeated in a message.
func (k key) hidden() bool {
	switch k.into.(type) {
	case *Secret, *DSN:
		return true
	}
	return false
}

func setNumber[T ~int | ~int64](k key, into *T, text string, parse func(string) (int64, bool),
	format func(int64, int) string, want string) string {
	n, ok := parse(text)
	switch {
	case !ok:
		return want
	case n < k.min || n > k.max:
		if k.max == math.MaxInt64 {
			return fmt.Sprintf("%s, %s or more", want, format(k.min, 10))
		}
		return fmt.Sprintf("%s, from %s to %s", want, format(k.min, 10), format(k.max, 10))
	}
	*into = T(n)
	return ""
}

func parseWhole(text string) (int64, bool) {
	n, err := strconv.ParseInt(text, 10, 64)
	return n, err == nil
}

var sizePattern = regexp.MustCompile(`^([0-9]{1,18})\s*(B|[kK]B|MB|GB|TB)$`)

// parseSize reads sizes as PostgreSQL does: 1kB is 1024 bytes.
func parseSize(text string) (int64, bool) {
	m := sizePattern.FindStringSubmatch(text)
	if m == nil {
		return 0, false
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	shift := map[string]int{"B": 0, "KB": 10, "MB": 20, "GB": 30, "TB": 40}[strings.ToUpper(m[2])]
	if err != nil || n > math.MaxInt64>>shift {
		return 0, false
	}
	return n << shift, true
}

func formatSize(n int64, _ int) string {
	for _, unit := range []struct {
		name  string
		shift int
	}{{"TB", 40}, {"GB", 30}, {"MB", 20}, {"KB", 10}} {
		if n >= 1<<unit.shift && n%(1<<unit.shift) == 0 {
			return strconv.FormatInt(n>>unit.shift, 10) + unit.name
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}

// parseDuration reads Go's durations, and whole days such as 30d.
func parseDuration(text string) (int64, bool) {
	if days, ok := strings.CutSuffix(text, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		return int64(n) * int64(24*time.Hour), err == nil
	}
	d, err := time.ParseDuration(text)
	return int64(d), err == nil
}

func formatDuration(n int64, _ int) string {
	const day = int64(24 * time.Hour)
	if n >= day && n%day == 0 {
		return strconv.FormatInt(n/day, 10) + "d"
	}
	text := time.Duration(n).String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

func splitList(text string) []string {
	var list []string
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part != "" {
			list = append(list, part)
		}
	}
	return list
}

func checkRedisURL(text string) string {
	if text == "" {
		return ""
	}
	if err := changelog.CheckRedisURL(text); err != nil {
		return fmt.Sprintf("%s (%v)", changelog.RedisURLs, err)
	}
	return ""
}

func checkDSN(text string) string {
	if text == "" {
		return ""
	}
	const want = "a PostgreSQL connection string such as postgres://user@host:5432/db"
	if strings.Contains(text, "://") {
		u, err := url.Parse(text)
		if err != nil { // the reason may quote a part of the password
			return want + " (percent-encode special characters of the password)"
		}
		if u.Scheme != "postgres" && u.Scheme != "postgresql" {
			return want
		}
	}
	if _, err := pgconn.ParseConfig(text); err != nil {
		var broken *pgconn.ParseConfigError
		if errors.As(err, &broken) && errors.Unwrap(broken) != nil {
			return fmt.Sprintf("%s (%v)", want, errors.Unwrap(broken))
		}
		return want
	}
	return ""
}

var slotPattern = regexp.MustCompile(`^[a-z0-9_]{1,63}$`)

func checkSlot(text string) string {
	if slotPattern.MatchString(text) {
		return ""
	}
	return "1 to 63 of a-z, 0-9 and _, as PostgreSQL asks of a slot"
}

func checkPublication(text string) string {
	if text != "" && len(text) <= 63 && !strings.ContainsRune(text, 0) {
		return ""
	}
	return "a name of 1 to 63 bytes"
}

func checkListen(text string) string {
	_, port, err := net.SplitHostPort(text)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return `host:port or :port, such as ":8080"`
	}
	return ""
}

func checkPublicURL(text string) string {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return "the http or https address that clients use, such as https://sync.example.com"
	}
	return ""
}

func checkOrigin(text string) string {
	if text == "*" {
		return ""
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme == "" || u.Host == "" || u.User != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
		return `an origin such as https://app.example.com, without a path, or "*"`
	}
	return ""
}

func checkProxy(text string) string {
	if _, err := netip.ParseAddr(text); err == nil {
		return ""
	}
	if _, err := netip.ParsePrefix(text); err == nil {
		return ""
	}
	return "an IP address or a network such as 10.0.0.0/8"
}

func checkSecret(text string) string {
	if text == "" || len(text) >= 32 {
		return ""
	}
	return "at least 32 bytes (openssl rand -base64 48 makes one)"
}

func checkJWKSURL(text string) string {
	u, err := url.Parse(text)
	if text == "" || err == nil && u.Scheme == "https" && u.Hostname() != "" && u.User == nil {
		return ""
	}
	return "an https address"
}

func checkRole(text string) string {
	if len(text) <= 63 && !strings.Contains(text, "\x00") {
		return ""
	}
	return "the name of a role, at most 63 bytes long"
}

func checkOptionalClaim(text string) string {
	if text == "" {
		return ""
	}
	return checkClaim(text)
}

func checkClaim(text string) string {
	if text == "" || slices.Contains(strings.Split(text, "."), "") {
		return "a claim's name, or its path such as realm_access.roles"
	}
	return ""
}
