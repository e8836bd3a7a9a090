package policies

import "strings"

// Nearest returns the name among the given ones that is most like got, or "" where none is like it. It is for hints.
func Nearest(got string, among []string) string {
	best, bestDistance := "", len(got)/3+2
	for _, name := range among {
		if d := distance(strings.ToLower(got), strings.ToLower(name)); d < bestDistance {
			best, bestDistance = name, d
		}
	}
	return best
}

// distance is the number of bytes to insert, drop, replace or swap with their neighbour to turn a into b.
func distance(a, b string) int {
	before, last, next := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		next[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			next[j] = min(last[j]+1, next[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				next[j] = min(next[j], before[j-2]+1)
			}
		}
		before, last, next = last, next, before
	}
	return last[len(b)]
}

// didYouMean turns the nearest name into a hint, or "" where nothing is near.
func didYouMean(got string, among []string) string {
	if name := Nearest(got, among); name != "" {
		return "did you mean " + name + "?"
	}
	return ""
}
