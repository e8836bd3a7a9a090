//go:build !race

package main

// buildFlags: see convergence_race_test.go.
var buildFlags []string
