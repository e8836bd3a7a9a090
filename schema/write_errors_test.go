package schema

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

func TestClassifyWhatPostgresSays(t *testing.T) {
	t.Parallel()
	dsn, _ := database(t, writeTables, `CREATE TABLE public.parent (id int PRIMARY KEY, u text UNIQUE, n int NOT NULL DEFAULT 0 CHECK (n < 100), v varchar(3), m bytea,
		r int4range, EXCLUDE USING gist (r WITH &&)); CREATE TABLE public.child (id int PRIMARY KEY, p int REFERENCES public.parent, late int REFERENCES public.parent DEFERRABLE);
		INSERT INTO public.parent VALUES (1, 'secret', 1, NULL, NULL, '[1,5)'), (2, 'b', 1, NULL, NULL, NULL); INSERT INTO public.child VALUES (1, 1, NULL);
		INSERT INTO public.parts VALUES (1, 5)`)
	pool := sourcePool(t, dsn)
	for _, c := range []struct {
		table    string
		kind     WriteKind
		key      string
		data     string
		want     string
		keyTaken bool
	}{
		{"parent", Insert, "1", `{"u":"x"}`, CodeUniqueViolation, true},
		{"parts", Insert, `["1","5"]`, `{"v":"x"}`, CodeUniqueViolation, true},
		{"parent", Insert, "9", `{"u":"secret"}`, CodeUniqueViolation, false},
		{"parent", Insert, "9", `{"n":null}`, CodeNotNull, false},
		{"parent", Insert, "9", `{"n":100}`, CodeCheckViolation, false},
		{"parent", Insert, "9", `{"r":"[2,3)"}`, CodeExclusionViolation, false},
		{"parent", Update, "2", `{"v":"secret"}`, CodeInvalidValue, false},
		{"parent", Update, "2", `{"n":"secret"}`, CodeInvalidValue, false},
		{"parent", Update, "2", `{"n":99999999999}`, CodeInvalidValue, false},
		{"parent", Update, "2", `{"u":"a\u0000"}`, CodeInvalidValue, false},
		{"parent", Update, "2", `{"u":"\ud800"}`, CodeInvalidValue, false},
		{"parent", Update, "2", `{"u":{"a":1}}`, CodeInvalidValue, false},
		{"parent", Update, "2", `{"nope":1}`, CodeUnknownColumn, false},
		{"parent", Update, "secret", `{"n":1}`, CodeInvalidValue, false},
		{"parent", Delete, "1", ``, CodeStillReferenced, false},
		{"child", Insert, "2", `{"p":77}`, CodeForeignKeyMissing, false},
		{"child", Update, "1", `{"late":77}`, CodeForeignKeyMissing, false},
		{"plain", Insert, "1", `{"d":"bad"}`, CodeCheckViolation, false},
		{"plain", Insert, "1", `{"d":null}`, CodeNotNull, false},
		{"plain", Insert, "1", `{"g":1}`, CodeInvalidValue, false},
		{"plain", Insert, "1", `{"b":"\u0000"}`, CodeInvalidValue, false},
		{"always", Insert, "1", `{"v":"x"}`, CodeInvalidValue, false},
		{"shy", Insert, "1", `{"v":"say"}`, CodeApplicationError, false},
		{"shy", Insert, "1", `{"v":"own"}`, CodeApplicationError, false},
	} {
		table := loadTable(t, pool, "public."+c.table)
		key, err := ParseDocID(table, c.key)
		if err != nil {
			t.Fatal(err)
		}
		data, err := members([]byte(c.data))
		if err != nil {
			t.Fatal(err)
		}
		w := Write{Table: table, Kind: c.kind, Key: key, Data: []byte(c.data)}
		for name := range data {
			w.Columns = append(w.Columns, name)
		}
		_, err = write(t, pool, w)
		got := Classify(err)
		if err == nil || got.Code != c.want || table.KeyTaken(err) != c.keyTaken || got.Again || got.Retryable != (c.want == CodeForeignKeyMissing) {
			t.Errorf("%s %c %s %s: %+v of %v", c.table, c.kind, c.key, c.data, got, err)
		}
		for _, leak := range []string{"secret", "77", "hidden", "parent_", "999"} {
			if strings.Contains(got.Message, leak) {
				t.Errorf("%s %s tells %q", c.table, c.data, got.Message)
			}
		}
		if c.data == `{"v":"say"}` && got.Message != "told by the application" {
			t.Errorf("the application's words became %q", got.Message)
		}
	}
}

func TestClassifyStates(t *testing.T) {
	t.Parallel()
	german := &pgconn.PgError{Code: "23503", Message: `Aktualisieren oder Löschen in Tabelle »a« verletzt Fremdschlüssel-Constraint »b« von Tabelle »c«`}
	for want, err := range map[Failure]error{
		{Code: CodeInternal, Message: internalMessage, Retryable: true, Again: true}: &BatchError{0, 1, &pgconn.PgError{Code: "40P01", Message: "secret"}},
		{Code: CodeInternal, Message: internalMessage, Retryable: true}:              errors.New("secret"),
		{Code: CodeStillReferenced, Message: "other rows still refer to this one"}:   german,
		{Code: CodePermission, Message: "the change is not permitted"}:               &pgconn.PgError{Code: "42501", Message: "secret"},
	} {
		if got := Classify(err); got != want {
			t.Errorf("%v: %+v, want %+v", err, got, want)
		}
	}
	if got := Classify(&pgconn.PgError{Code: "57014"}); !got.Busy || !got.Retryable || got.Again {
		t.Errorf("a timeout is %+v", got)
	}
}

// TestCheckAsksFindsTheBad mixes good and bad asks; the transaction stays usable.
func TestCheckAsksFindsTheBad(t *testing.T) {
	t.Parallel()
	dsn, _ := database(t, writeTables, `INSERT INTO public.plain (id) VALUES (1)`)
	pool := sourcePool(t, dsn)
	table := loadTable(t, pool, "public.plain")
	asks := make([]Ask, 100)
	for i := range asks {
		asks[i] = Ask{Key: []string{"1"}, Data: []byte(`{"n":1}`)}
	}
	asks[3].Key = []string{"x"}
	asks[50].Base = []byte(`{"ts":"never"}`)
	asks[51].Data = []byte(`{"b":"\u0000"}`)
	asks[99] = Ask{Key: []string{"99999999999"}, Data: []byte(`{"n":"y"}`)}
	want := map[int]string{3: CodeInvalidKey, 50: CodeInvalidValue, 51: CodeInvalidValue, 99: CodeInvalidKey}
	err := inTx(t, pool, func(tx pgx.Tx) error {
		faults, err := CheckAsks(context.Background(), tx, table, asks)
		if err != nil {
			return err
		}
		var good []Ask
		for i, fault := range faults {
			switch {
			case fault == nil && want[i] == "":
				good = append(good, asks[i])
			case fault == nil || Classify(fault).Code != want[i]:
				t.Errorf("ask %d: %v, want %q", i, fault, want[i])
			}
		}
		found, err := LockRows(context.Background(), tx, table, good)
		if err == nil && (len(found) != 96 || found[95].Row == nil) {
			t.Errorf("found %d", len(found))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
