package chaos

import (
	_ "embed" // of the built-in world
	"encoding/json"
	"fmt"

	"github.com/walgate/walgate/policies"
)

// BuiltinSchema is the SQL that makes the application of the built-in world, for a database without tables. Its table edits
// notes each pushed change that was applied, so that they can be counted.
//
//go:embed testdata/schema.sql
var BuiltinSchema string

// BuiltinCollections are the built-in world's collections, as JSON, which is YAML too: what a configuration has under
// collections.
//
//go:embed testdata/collections.json
var BuiltinCollections string

// BuiltinSpecs returns the policies of BuiltinCollections.
func BuiltinSpecs() (map[string]policies.Spec, error) {
	var each map[string]struct {
		Table      string
		Columns    policies.ColumnsSpec
		Scope      json.RawMessage
		Where      string
		Read       policies.ReadSpec
		SoftDelete struct{ Column string } `json:"soft_delete"`
		Lossless   bool
		Write      *policies.WriteSpec
		Conflict   json.RawMessage
		OnDeleted  string `json:"on_deleted"`

		Attachments []policies.AttachmentSpec
	}
	if err := json.Unmarshal([]byte(BuiltinCollections), &each); err != nil {
		return nil, fmt.Errorf("the built-in world's collections: %w", err)
	}
	specs := map[string]policies.Spec{}
	for name, c := range each {
		s := policies.Spec{Table: c.Table, Columns: c.Columns, Where: c.Where, Read: c.Read, SoftDelete: c.SoftDelete.Column,
			Lossless: c.Lossless, Write: c.Write, OnDeleted: c.OnDeleted, Attachments: c.Attachments}
		if c.Scope != nil && json.Unmarshal(c.Scope, &s.Scope) != nil { // one map, or a list of them
			s.Scope = make([]map[string]string, 1)
			if err := json.Unmarshal(c.Scope, &s.Scope[0]); err != nil {
				return nil, fmt.Errorf("the built-in world's collection %s: scope: %w", name, err)
			}
		}
		if c.Conflict != nil && json.Unmarshal(c.Conflict, &s.Conflict) != nil { // a name, or a function
			var by struct{ Function string }
			if err := json.Unmarshal(c.Conflict, &by); err != nil {
				return nil, fmt.Errorf("the built-in world's collection %s: conflict: %w", name, err)
			}
			s.Conflict, s.ConflictFunction = policies.Function, by.Function
		}
		specs[name] = s
	}
	return specs, nil
}
