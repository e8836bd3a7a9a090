//go:build race

package main

// buildFlags make the gateway under test look for races where the test does, and able to die at a named step.
var buildFlags = []string{"-tags=failpoints", "-race"}
