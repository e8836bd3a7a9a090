// Package policies decides who may see a row and what a change of it means to them, who may change it, and what becomes
// of a change that meets another.
//
// It owns the compiled collections: scopes, filters (CEL), read roles, soft delete, fingerprints; write rules, conflict
// and delete policies. It is pure: no I/O,
// no clock, no database. Everything it returns is immutable after Compile and safe for concurrent use, except a
// Binding, which belongs to one goroutine.
package policies
