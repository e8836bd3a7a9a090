package policies

import (
	"regexp"
	"slices"
	"strconv"
	"strings"

	"pgregory.net/rapid"

	"github.com/walgate/walgate/schema"
)

var sqlTerm = regexp.MustCompile(`"(\w+)" = ANY\(\$(\d+)::\w+\[\]\)`)

// matches evaluates a predicate of ScopeSQL over a row of modelTable as PostgreSQL would.
func matches(t *rapid.T, predicate string, args []string, row schema.Row) bool {
	if predicate == "true" || predicate == "false" {
		return predicate == "true"
	}
	for alternative := range strings.SplitSeq(predicate, " OR ") {
		terms := sqlTerm.FindAllStringSubmatch(alternative, -1)
		if len(terms) != 1+strings.Count(alternative, " AND ") {
			t.Fatalf("%s of %s is not understood", alternative, predicate)
		}
		all := true
		for _, term := range terms {
			value := row[modelTable().Column(term[1])]
			n, _ := strconv.Atoi(term[2])
			all = all && value != nil && slices.Contains(arrayTexts(args[n-1]), string(value))
		}
		if all {
			return true
		}
	}
	return false
}

// arrayTexts splits {"a","b"}; the model's values need no escapes.
func arrayTexts(literal string) []string {
	return strings.Split(strings.TrimSuffix(strings.TrimPrefix(literal, `{"`), `"}`), `","`)
}
