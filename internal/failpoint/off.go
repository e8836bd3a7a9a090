//go:build !failpoints

package failpoint

// Here is where the process may be told to die.
func Here(Point) {}
