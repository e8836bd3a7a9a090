package gateway

import (
	"crypto/sha256"
	"crypto/sha512"
	"testing"
)

// FuzzRange: a range that is served lies within the attachment.
func FuzzRange(f *testing.F) {
	for _, set := range []string{"0-0", "5-", "-5", "10-20", "-0", "9-3", "0-99999999999999999999", "1-2,4-5", "", "-", "a-b", "٣-٤"} {
		f.Add(set, int64(10))
	}
	f.Fuzz(func(t *testing.T, set string, size int64) {
		if size < 0 {
			return
		}
		if r, ok := parseRange(set, size); ok && (r.first < 0 || r.length < 1 || r.first > size-r.length) {
			t.Errorf("%q of %d bytes: %+v", set, size, r)
		}
	})
}

// FuzzDigests: a digest that is taken is as long as its algorithm's.
func FuzzDigests(f *testing.F) {
	for _, text := range []string{"", "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:", "sha-256=::", "md5=:AA==:, SHA-256=:AA==:", "sha-512=:", "sha-256=47DEQpj8HBSa", ",,="} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		d, err := parseDigests("Content-Digest", text)
		if err == nil && (d.sha256 != nil && len(d.sha256) != sha256.Size || d.sha512 != nil && len(d.sha512) != sha512.Size) {
			t.Errorf("%q: %+v", text, d)
		}
	})
}

// FuzzManifestRequest: a request that is taken has a client, a position and a limit.
func FuzzManifestRequest(f *testing.F) {
	for _, body := range []string{`{"client_id":"a","since_version":0}`, `{"client_id":"a","since_version":1e3,"limit":5}`, `{"client_id":"","since_version":-1}`, `{"client_id":null}`, `[]`, `{"client_id":"\u0000","since_version":1.0}`, `{"client_id":"a","since_version":99999999999999999999}`} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := parseManifest(body)
		if err == nil && (r.clientID == "" || clientFault(r.clientID) != "" || r.since < 0 || r.limit < 1 || r.limit > manifestMost) {
			t.Errorf("%q: %+v", body, r)
		}
	})
}
