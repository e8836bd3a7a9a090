package badlink

import "testing"

// New starts a relay to target, host:port, that ends with the test.
func New(t testing.TB, target string) *Link {
	t.Helper()
	l, err := Start(target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

// To starts a relay to the server of a connection string, as pgserver writes them: a URL.
func To(t testing.TB, dsn string) *Link {
	t.Helper()
	u, err := parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	return New(t, u.Host)
}

// DSN is the connection string, a URL, through the relay.
func (l *Link) DSN(t testing.TB, dsn string) string {
	t.Helper()
	through, err := l.Through(dsn)
	if err != nil {
		t.Fatal(err)
	}
	return through
}

// Turn is TurnTo the server of a connection string.
func (l *Link) Turn(t testing.TB, dsn string) {
	t.Helper()
	u, err := parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	l.TurnTo(u.Host)
}
