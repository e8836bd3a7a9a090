//go:build !race

package main

// buildFlags: see process_race_test.go.
var buildFlags = []string{"-tags=failpoints"}
