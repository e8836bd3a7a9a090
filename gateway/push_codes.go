package gateway

import (
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// Codes of outcomes besides those of packages policies and schema.
const (
	codeUnknownCollection = "unknown_collection"
	codeUnknownOperation  = "unknown_operation"
	codeColumnNotWritable = "column_not_writable"
	codeInvalidChange     = "invalid_change"
	codeKeyMismatch       = "key_mismatch"
	codeOutOfScope        = "out_of_scope"
	codeCheckFailed       = "check_failed"
	codeBatchRejected     = "batch_rejected"
	codeAttachmentMissing = "attachment_missing"
)

// pushOutcome is one row of the table of what a pushed change can be rejected with.
type pushOutcome struct {
	code      string
	retryable bool   // whether the same change may succeed later
	meaning   string //
	remedy    string // what the client does
}

// pushOutcomes is the one table of the codes of rejected changes. They are stable: clients branch on them.
var pushOutcomes = []pushOutcome{
	{policies.CodePermission, false, "The caller, or the database's role for it, may not do this", "Drop the change; ask for the right."},
	{codeUnknownCollection, false, "There is no such collection", "Correct the name."},
	{codeUnknownOperation, false, "There is no such operation", "Use insert, update, upsert or delete."},
	{schema.CodeUnknownColumn, false, "`data` or `base` names a column that documents don't have", "Correct the name, or leave it out."},
	{codeColumnNotWritable, false, "`data` names a column that clients may not write", "Leave it out."},
	{codeInvalidChange, false, "The change is malformed, or its `change_id` is in the push twice", "Correct what `error` names."},
	{schema.CodeInvalidKey, false, "`doc_id` is no key of the collection", "Correct it."},
	{codeKeyMismatch, false, "`data` has another key than `doc_id`", "Leave the key out of `data`."},
	{schema.CodeInvalidValue, false, "A value can't be stored in its column", "Correct the value."},
	{policies.CodeInvalidParentVersion, false, "`parent_version` was never given out", "Send the version that came with the row."},
	{policies.CodeNotFound, false, "There is no such row for this caller", "Drop the change, or upsert the row."},
	{policies.CodeDeleted, false, "The row was deleted, and stays so by the collection's policy", "Drop the row."},
	{policies.CodeConflict, false, "The row changed since it was read", "Merge with `document` and push with its `version`."},
	{policies.CodeResolverFailed, false, "The function that settles conflicts failed", "Merge with `document`; tell the operator."},
	{codeOutOfScope, false, "The row would not be in the caller's scope", "Correct the values of its scope columns."},
	{codeCheckFailed, false, "The row breaks a rule for writing to the collection", "Correct the values."},
	{schema.CodeUniqueViolation, false, "Another row has the key, or a value that must be unique", "Merge with `document` if there is one; else choose another value."},
	{schema.CodeForeignKeyMissing, true, "A row that is referred to doesn't exist for this caller", "Push the parent first, or with it; then repeat."},
	{codeAttachmentMissing, false, "The row would name an attachment that doesn't exist for this caller", "Drop the reference; or upload the file under an id of its own."},
	{schema.CodeStillReferenced, false, "Other rows refer to the row", "Delete those first."},
	{schema.CodeCheckViolation, false, "The row breaks a rule of its table", "Correct the values."},
	{schema.CodeNotNull, false, "A column that needs a value has none", "Send the value."},
	{schema.CodeExclusionViolation, false, "The row excludes another one", "Correct the values."},
	{schema.CodeApplicationError, false, "The application refused the change; `error` is its message", "Show the message."},
	{codeBatchRejected, false, "Another change of the atomic push was rejected", "Correct that one; then repeat all."},
	{schema.CodeInternal, true, "The change could not be written now", "Repeat it later."},
}

// retryableOutcomes are the codes of changes that may succeed later as they are.
var retryableOutcomes = func() map[string]bool {
	retryable := map[string]bool{}
	for _, o := range pushOutcomes {
		retryable[o.code] = o.retryable
	}
	return retryable
}()
