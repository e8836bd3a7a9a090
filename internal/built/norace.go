//go:build !race

package built

var flags = []string{"-tags=failpoints"}
