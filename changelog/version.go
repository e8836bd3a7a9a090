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
	dst = appendTime(dst, int64(v>>counterBits)+epochMillis)
	const hex = "0123456789abcdef"
	c := v & (1<<counterBits - 1)
	dst = append(dst, '-', '0', hex[c>>8&15], hex[c>>4&15], hex[c&15], '-')
	return append(dst, history...)
}

// appendTime appends Unix milliseconds from 1970 to 9999 in timeLayout. Package time's general way took a tenth of a page.
func appendTime(dst []byte, ms int64) []byte {
	day, ms := ms/86_400_000, ms%86_400_000
	// The civil calendar in eras of 400 years that begin on the first of March, so that a leap day ends its year.
	z := day + 719_468
	era, doe := z/146_097, z%146_097
	yoe := (doe - doe/1460 + doe/36_524 - doe/146_096) / 365
	doy := doe - (365*yoe + yoe/4 - yoe/100)
	mp := (5*doy + 2) / 153
	month, year := mp+3, yoe+era*400
	if month > 12 {
		month, year = month-12, year+1
	}
	dst = appendDigits(dst, year, 4)
	dst = appendDigits(dst, month, 2)
	dst = appendDigits(dst, doy-(153*mp+2)/5+1, 2)
	dst = appendDigits(append(dst, 'T'), ms/3_600_000, 2)
	dst = appendDigits(dst, ms/60_000%60, 2)
	dst = appendDigits(dst, ms/1000%60, 2)
	dst = appendDigits(append(dst, '.'), ms%1000, 3)
	return append(dst, 'Z')
}

func appendDigits(dst []byte, n int64, width int) []byte {
	dst = append(dst, "0000"[:width]...)
	for i := len(dst) - 1; width > 0; i, width = i-1, width-1 {
		dst[i] += byte(n % 10)
		n /= 10
	}
	return dst
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
