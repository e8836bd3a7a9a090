package changelog

import (
	"errors"
	"fmt"
	"strconv"
	"time"
)

// Version is a place in the one order of everything: a hybrid logical clock value,
// (milliseconds since 2020-01-01T00:00:00Z) << 12 | counter. It stays below 2^53 until 2089.
type Version int64

const (
	counterBits = 12
	// epochMillis is 2020-01-01T00:00:00Z in Unix milliseconds.
	epochMillis = 1577836800000
	// maxVersion is the last version that has a text form (year 9999).
	maxVersion = Version((253402300800000-epochMillis)<<counterBits - 1)
	timeLayout = "20060102T150405.000Z"
	// versionTextLen is the length of a version's text with its history.
	versionTextLen = len(timeLayout) + 1 + 4 + 1 + 4
)

// VersionAt returns the first version of the millisecond that t lies in.
func VersionAt(t time.Time) Version { return Version((t.UnixMilli() - epochMillis) << counterBits) }

// Time returns the physical part of v, in UTC.
func (v Version) Time() time.Time {
	return time.UnixMilli(int64(v>>counterBits) + epochMillis).UTC()
}

// AppendText appends v with its history as clients see it, e.g. 20260502T150000.000Z-0005-a1b2. Text order is order.
func (v Version) AppendText(dst []byte, history string) []byte {
	dst = v.Time().AppendFormat(dst, timeLayout)
	const hex = "0123456789abcdef"
	c := v & (1<<counterBits - 1)
	dst = append(dst, '-', '0', hex[c>>8&15], hex[c>>4&15], hex[c&15], '-')
	return append(dst, history...)
}

// Text returns v with its history as clients see it.
func (v Version) Text(history string) string {
	return string(v.AppendText(make([]byte, 0, versionTextLen), history))
}

// Clock stamps versions. It belongs to one goroutine.
type Clock struct{ last Version }

// NewClock returns a clock whose versions all lie above last.
func NewClock(last Version) *Clock { return &Clock{last: last} }

// Next returns the version of an event at the given physical time (Unix ms): never before, nor equal to, the last one.
func (c *Clock) Next(unixMilli int64) Version {
	v := Version((unixMilli - epochMillis) << counterBits)
	if v <= c.last {
		v = c.last + 1 // the counter carries into the milliseconds when it overflows
	}
	c.last = v
	return v
}

// Last returns the newest version stamped.
func (c *Clock) Last() Version { return c.last }

// Cursor is a client's place in the feed: what it sends as since.
type Cursor struct {
	Version   Version
	History   string // empty: a bare integer
	ScopeHash string // 8 hex digits; empty: not checked
}

// ErrCursor says that a since is neither a cursor, a version nor an integer.
var ErrCursor = errors.New("not a cursor: send last_seq as it was received, a version, or a whole number")

// String returns the opaque text form of c.
func (c Cursor) String() string {
	b := make([]byte, 0, versionTextLen+9)
	b = c.Version.AppendText(b, c.History)
	if c.ScopeHash != "" {
		b = append(b, '-')
		b = append(b, c.ScopeHash...)
	}
	return string(b)
}

// ParseCursor reads a since: a whole number, a version's text, or a last_seq. Only the canonical form is accepted, so
// that two texts never name one place.
func ParseCursor(s string) (Cursor, error) {
	if s == "" {
		return Cursor{}, ErrCursor
	}
	if len(s) < 17 && isDigits(s) {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || Version(n) > maxVersion || (len(s) > 1 && s[0] == '0') {
			return Cursor{}, ErrCursor
		}
		return Cursor{Version: Version(n)}, nil
	}
	c := Cursor{}
	switch len(s) {
	case versionTextLen:
	case versionTextLen + 9:
		if s[versionTextLen] != '-' || !isHex(s[versionTextLen+1:]) {
			return Cursor{}, ErrCursor
		}
		c.ScopeHash = s[versionTextLen+1:]
	default:
		return Cursor{}, ErrCursor
	}
	v := s[:versionTextLen]
	n := len(timeLayout)
	if v[n] != '-' || v[n+5] != '-' || v[n+1] != '0' || !isHex(v[n+1:n+5]) || !isHex(v[n+6:]) {
		return Cursor{}, ErrCursor
	}
	t, err := time.Parse(timeLayout, v[:n])
	if err != nil {
		return Cursor{}, ErrCursor
	}
	count, _ := strconv.ParseInt(v[n+1:n+5], 16, 64)
	c.Version = VersionAt(t) | Version(count)
	c.History = v[n+6:]
	if c.Version < 0 || c.Version > maxVersion || c.Version.Text(c.History) != v {
		return Cursor{}, ErrCursor
	}
	return c, nil
}

// LSN is a position in the source's WAL.
type LSN uint64

// String returns the LSN as PostgreSQL prints it.
func (l LSN) String() string { return fmt.Sprintf("%X/%X", uint32(l>>32), uint32(l)) }

// ParseLSN reads an LSN as PostgreSQL prints it.
func ParseLSN(s string) (LSN, error) {
	var hi, lo uint32
	if n, err := fmt.Sscanf(s, "%X/%X", &hi, &lo); err != nil || n != 2 {
		return 0, fmt.Errorf("parse LSN %q: want two hexadecimal numbers with a slash", s)
	}
	return LSN(hi)<<32 | LSN(lo), nil
}

func isDigits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}

func isHex(s string) bool {
	for i := range len(s) {
		if (s[i] < '0' || s[i] > '9') && (s[i] < 'a' || s[i] > 'f') {
			return false
		}
	}
	return true
}
