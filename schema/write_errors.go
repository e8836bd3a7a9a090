package schema

import (
	"errors"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// The codes that Classify gives; stable, they are what a client reads.
const (
	CodePermission         = "permission"
	CodeUnknownColumn      = "unknown_column"
	CodeInvalidKey         = "invalid_key"
	CodeInvalidValue       = "invalid_value"
	CodeUniqueViolation    = "unique_violation"
	CodeForeignKeyMissing  = "foreign_key_missing"
	CodeStillReferenced    = "still_referenced"
	CodeCheckViolation     = "check_violation"
	CodeNotNull            = "not_null"
	CodeExclusionViolation = "exclusion_violation"
	CodeApplicationError   = "application_error"
	CodeInternal           = "internal"
)

// UnknownColumnError names a column that the table doesn't have.
type UnknownColumnError struct{ Column string }

func (e *UnknownColumnError) Error() string { return "there is no column " + e.Column }

// Failure is what a failed read or write of a push means for who sent it. It holds no value of any row, and no name of a
// constraint.
type Failure struct {
	Code      string
	Message   string
	Column    string // the column at fault, where the database names one; who may not know the column must not be told
	Retryable bool   // the same change may succeed later
	Again     bool   // the transaction lost against another one: do all of it again, at once
	Busy      bool   // a lock or the time for a statement was waited for in vain
}

// Classify says what an error of LockRows, ExecWrites or the end of a transaction means. Table.KeyTaken tells the
// unique_violation that is a lost race.
func Classify(err error) Failure {
	var value *ValueError
	var unknown *UnknownColumnError
	var pg *pgconn.PgError
	switch {
	case errors.Is(err, ErrKey):
		return Failure{Code: CodeInvalidKey, Message: "doc_id is not a key of this collection"}
	case errors.As(err, &unknown):
		return Failure{Code: CodeUnknownColumn, Message: "there is no such column", Column: unknown.Column}
	case errors.As(err, &value):
		return Failure{Code: CodeInvalidValue, Message: "the value can't be stored: " + value.Reason, Column: value.Column}
	case errors.As(err, &pg):
		return classifyState(pg)
	}
	return Failure{Code: CodeInternal, Message: internalMessage, Retryable: true}
}

const internalMessage = "the change could not be written; try again later"

func classifyState(pg *pgconn.PgError) Failure {
	switch pg.Code {
	case "40001", "40P01":
		return Failure{Code: CodeInternal, Message: internalMessage, Retryable: true, Again: true}
	case "55P03", "57014":
		return Failure{Code: CodeInternal, Message: "the database is busy; try again later", Retryable: true, Busy: true}
	case "23505":
		return Failure{Code: CodeUniqueViolation, Message: "another row has this value already"}
	case "23503":
		if fromParent(pg) {
			return Failure{Code: CodeStillReferenced, Message: "other rows still refer to this one"}
		}
		return Failure{Code: CodeForeignKeyMissing, Message: "a row that this one refers to doesn't exist", Retryable: true}
	case "23001":
		return Failure{Code: CodeStillReferenced, Message: "other rows still refer to this one"}
	case "23514", "44000":
		return Failure{Code: CodeCheckViolation, Message: "the row breaks a rule of its table"}
	case "23502":
		return Failure{Code: CodeNotNull, Message: "a column that needs a value has none", Column: pg.ColumnName}
	case "23P01":
		return Failure{Code: CodeExclusionViolation, Message: "the row conflicts with another one"}
	case "42501":
		return Failure{Code: CodePermission, Message: "the change is not permitted"}
	case "428C9":
		return Failure{Code: CodeInvalidValue, Message: "the database itself assigns a column that was given a value"}
	case "54000", "54001", "54023":
		return Failure{Code: CodeInvalidValue, Message: "a value is larger than the database can store"}
	case "P0001":
		return Failure{Code: CodeApplicationError, Message: pg.Message}
	}
	switch {
	case strings.HasPrefix(pg.Code, "22"):
		return Failure{Code: CodeInvalidValue, Message: "a value is not of its column's type", Column: pg.ColumnName}
	case strings.HasPrefix(pg.Code, "P0"), !standardClass(pg.Code):
		return Failure{Code: CodeApplicationError, Message: "the application refused the change"}
	}
	return Failure{Code: CodeInternal, Message: internalMessage, Retryable: true}
}

// standardClass says whether a state is PostgreSQL's own; functions of the application raise others.
func standardClass(state string) bool {
	const classes = " 00 01 02 03 08 09 0A 0B 0F 0L 0P 0Z 20 21 22 23 24 25 26 27 28 2B 2D 2F 34 38 39 3B 3D 3F 40 42 44 53 54 55 57 58 72 F0 HV P0 XX "
	return len(state) == 5 && strings.Contains(classes, " "+state[:2]+" ")
}

// fromParent says that a row refers to the one that was to go, and not that the one referred to is missing. Both have one
// state and the same fields; the message names two relations where the parent was at fault, in whatever language.
func fromParent(pg *pgconn.PgError) bool {
	switch {
	case strings.HasPrefix(pg.Message, "insert or update on table "):
		return false
	case strings.HasPrefix(pg.Message, "update or delete on table "):
		return true
	}
	marks := 0
	for _, r := range pg.Message {
		if strings.ContainsRune("\"«»„“”「」『』", r) {
			marks++
		}
	}
	return marks >= 6
}

// KeyTaken says that an insert found its primary key taken. Where the row was not there when LockRows looked, another
// transaction was quicker, and doing everything again shows its row.
func (t *Table) KeyTaken(err error) bool {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || pg.Code != "23505" {
		return false
	}
	for _, k := range t.keyNames {
		if k == (keyName{pg.SchemaName, pg.TableName, pg.ConstraintName}) {
			return true
		}
	}
	return false
}
