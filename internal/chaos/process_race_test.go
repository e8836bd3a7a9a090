//go:build race

package chaos

// buildFlags make the gateways look for races where the test does, and able to die at a named step.
var buildFlags = []string{"-tags=failpoints", "-race"}
