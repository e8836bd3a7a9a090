//go:build !race

package chaos

// buildFlags: see process_race_test.go.
var buildFlags = []string{"-tags=failpoints"}
