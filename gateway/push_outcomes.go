package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// storedOutcome is what was committed for a change_id.
type storedOutcome struct {
	hash    []byte
	push    int64
	outcome outcomeBody
}

// outcomeBody is a row's outcome in walgate.outcomes. It holds no document: a replay shows the row as it then is.
type outcomeBody struct {
	Status  policies.Status `json:"status"`
	DocID   string          `json:"doc_id"`
	Policy  string          `json:"policy,omitempty"`
	Columns []string        `json:"columns,omitempty"`
}

// queueOutcomes reads what earlier pushes of this client came to.
func (x *pushTx) queueOutcomes(b *pgx.Batch) {
	x.outcomes = map[string]storedOutcome{}
	var ids []string
	for i := range x.changes {
		if c := &x.changes[i]; c.hash != nil {
			ids = append(ids, c.changeID)
		}
	}
	if len(ids) == 0 {
		return
	}
	b.Queue(`SELECT change_id, hash, push_id, outcome::text FROM walgate.outcomes WHERE subject = $1 AND client_id = $2 AND change_id = ANY ($3)`,
		x.caller.Subject, x.r.client, ids).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var id string
			var text []byte
			var o storedOutcome
			err := rows.Scan(&id, &o.hash, &o.push, &text)
			if err == nil {
				err = json.Unmarshal(text, &o.outcome)
			}
			if err != nil {
				return err
			}
			x.outcomes[id] = o
		}
		return rows.Err()
	})
}

// recall answers changes that were done before as they were answered then.
func (x *pushTx) recall(ctx context.Context) error {
	var reused []FieldError
	for i := range x.changes {
		c := &x.changes[i]
		o, known := x.outcomes[c.changeID]
		switch {
		case c.hash == nil || !known:
			continue
		case !bytes.Equal(o.hash, c.hash):
			reused = append(reused, FieldError{fmt.Sprintf("changes[%d].change_id", i), fmt.Sprintf("%q came with another change before", shorten(c.changeID))})
			continue
		}
		c.result = pushResult{docID: o.outcome.DocID, status: o.outcome.Status, policy: o.outcome.Policy, columns: o.outcome.Columns, duplicate: true, first: o.push}
		if o.outcome.Status != policies.ConflictResolved || c.plan == nil {
			continue
		}
		if err := x.showNow(ctx, c); err != nil {
			return err
		}
	}
	if len(reused) > 0 {
		return &Problem{Code: ChangeIDReused, Detail: "a change_id names one change for ever; nothing was written", Errors: reused[:min(len(reused), mostFaults)]}
	}
	return nil
}

// showNow shows the row of a change that was done before.
func (x *pushTx) showNow(ctx context.Context, c *pending) error {
	key, err := schema.ParseDocID(c.plan.t, c.result.docID)
	if err != nil {
		return nil // the key has another form now
	}
	var columns []string
	for _, k := range c.plan.t.Key {
		columns = append(columns, c.plan.t.Columns[k].Name)
	}
	rows, err := schema.FindRows(ctx, x, c.plan.t, columns, [][]string{key})
	if err != nil || rows[0] == nil {
		return err
	}
	b, err := c.plan.binding()
	if err != nil {
		return err
	}
	defer c.plan.release(b)
	return x.show(c, b, rows[0])
}

// remember queues what has to be known of the push later: the outcomes of its changes, the keys given for local ids, and
// the mark by which the feed knows these.
func (x *pushTx) remember(b *pgx.Batch) error {
	var ids []string
	var hashes [][]byte
	var outcomes []string
	for i := range x.changes {
		c := &x.changes[i]
		r := &c.result
		if c.hash == nil || r.duplicate || r.status == policies.Rejected {
			continue
		}
		text, err := json.Marshal(outcomeBody{r.status, r.docID, r.policy, r.columns})
		if err != nil {
			return err
		}
		ids, hashes, outcomes = append(ids, c.changeID), append(hashes, c.hash), append(outcomes, string(text))
	}
	if len(ids) > 0 {
		b.Queue(`INSERT INTO walgate.outcomes (subject, client_id, change_id, hash, push_id, outcome)
			SELECT $1, $2, c.change_id, c.hash, $3, c.outcome::json FROM unnest($4::text[], $5::bytea[], $6::text[]) AS c(change_id, hash, outcome)`,
			x.caller.Subject, x.r.client, x.id, ids, hashes, outcomes)
	}
	if len(x.made) == 0 {
		return nil
	}
	locals, err := json.Marshal(x.made)
	if err != nil {
		return err
	}
	b.Queue(`INSERT INTO walgate.local_ids (subject, client_id, collection, local_id, doc_id, push_id)
		SELECT $1, $2, l.collection, l.local_id, l.doc_id, $3 FROM json_to_recordset($4::text::json) AS l(collection text, local_id text, doc_id text)`,
		x.caller.Subject, x.r.client, x.id, string(locals))
	b.Queue(`INSERT INTO walgate.pushes (subject, client_id, locals) VALUES ($1, $2, $3::text::json)`, x.caller.Subject, x.r.client, string(locals))
	return nil
}
