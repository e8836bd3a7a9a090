//go:build race

package main

// buildFlags make the gateway under test look for races where the test does.
var buildFlags = []string{"-race"}
