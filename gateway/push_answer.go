package gateway

import (
	"strconv"

	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// finish is called when nothing of the results but versions will change.
func (p *push) finish() {
	for i := range p.changes {
		c := &p.changes[i]
		if c.result.status == "" { // rejected before the source was asked
			c.reset()
		}
	}
}

// answer is the body of the answer.
func (p *push) answer() []byte {
	size := 64
	for i := range p.changes {
		size += len(p.changes[i].result.document) + len(p.changes[i].result.docID) + 200
	}
	b := append(make([]byte, 0, size), `{"results":[`...)
	for i := range p.changes {
		if i > 0 {
			b = append(b, ',')
		}
		b = p.changes[i].appendResult(b)
	}
	b = append(b, `],"txid":`...)
	if p.id == 0 {
		b = append(b, "null"...)
	} else {
		b = strconv.AppendInt(b, p.txid, 10)
	}
	b = append(b, `,"visible_at":`...)
	return append(appendTextOrNull(b, p.visibleAt), '}')
}

// appendResult appends the result of one change.
func (c *pending) appendResult(b []byte) []byte {
	r := &c.result
	status := string(r.status)
	if r.duplicate {
		status = "duplicate"
	}
	b = append(b, `{"doc_id":`...)
	b = appendTextOrNull(b, r.docID)
	if c.localID != "" {
		b = schema.AppendString(append(b, `,"local_id":`...), []byte(c.localID))
	}
	if c.changeID != "" {
		b = schema.AppendString(append(b, `,"change_id":`...), []byte(c.changeID))
	}
	b = append(append(append(b, `,"status":"`...), status...), `","new_version":`...)
	if r.written || r.duplicate {
		b = appendTextOrNull(b, r.version)
	} else {
		b = append(b, "null"...)
	}
	if r.status != policies.Accepted {
		b = append(b, `,"document":`...)
		if r.document == nil {
			b = append(b, `null,"version":null`...)
		} else {
			b = append(append(b, r.document...), `,"version":`...)
			b = appendTextOrNull(b, r.version)
		}
	}
	if r.policy != "" {
		b = schema.AppendString(append(b, `,"policy":`...), []byte(r.policy))
		b = append(b, `,"columns":[`...)
		for i, name := range r.columns {
			if i > 0 {
				b = append(b, ',')
			}
			b = schema.AppendString(b, []byte(name))
		}
		b = append(b, ']')
	}
	if r.code != "" {
		b = schema.AppendString(append(b, `,"code":`...), []byte(r.code))
		b = schema.AppendString(append(b, `,"error":`...), []byte(r.detail))
		b = strconv.AppendBool(append(b, `,"retryable":`...), retryableOutcomes[r.code])
	}
	return append(b, '}')
}

func appendTextOrNull(b []byte, text string) []byte {
	if text == "" {
		return append(b, "null"...)
	}
	return schema.AppendString(b, []byte(text))
}
