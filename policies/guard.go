package policies

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/walgate/walgate/schema"
)

// A guard holds what a filter over claims must know of a change, so that it can be judged for each caller later: one
// byte that says which sides are there, then of each side, the new one first, the filter's columns in table order: the
// text's length + 1 as a varint and the text, or 0 for NULL.
const (
	guardNew = 1 << iota
	guardOld
)

// AppendGuard appends the guard of a change for its log entries, and nothing where the collection needs none. The old
// side is there only where the row may have been visible before and is not now, or in other scopes. For an Effect that
// is Entered, pass nil as old.
func (b *Binding) AppendGuard(dst []byte, old, new schema.Row) []byte {
	if !b.Collection.HasGuard() {
		return dst
	}
	oldLive := b.check(old) == nil && b.Live(old)
	newLive := b.check(new) == nil && b.Live(new)
	oldMatters := oldLive && !(newLive && b.sameFilter(old, new) && b.sameScopes(old, new))
	if !oldMatters && !newLive {
		return dst
	}
	at := len(dst)
	dst = append(dst, 0)
	if newLive {
		dst[at] |= guardNew
		dst = b.appendSide(dst, new)
	}
	if oldMatters {
		dst[at] |= guardOld
		dst = b.appendSide(dst, old)
	}
	return dst
}

func (b *Binding) appendSide(dst []byte, row schema.Row) []byte {
	for _, at := range b.eval.at {
		if row[at] == nil {
			dst = append(dst, 0)
			continue
		}
		dst = binary.AppendUvarint(dst, uint64(len(row[at]))+1)
		dst = append(dst, row[at]...)
	}
	return dst
}

var errGuard = errors.New("its guard is damaged: the change log was altered, or written under another policy")

// judgement is the memory of one Judge call.
type judgement struct {
	eval     *evaluation
	new, old schema.Row
}

// judgements are kept per filter: their evaluations are made for its columns.
type judgements struct{ pool sync.Pool }

func (j *judgements) get(f *filter) *judgement {
	if v, ok := j.pool.Get().(*judgement); ok {
		return v
	}
	at := make([]int, len(f.columns))
	for i := range at {
		at[i] = i
	}
	return &judgement{eval: newEvaluation(f, at), new: make(schema.Row, len(at)), old: make(schema.Row, len(at))}
}

// Judge says what a log entry in one of the caller's scopes means to the caller: false for nothing. An Upsert may turn
// into a Leave. The error is the policy's; the operation holds even so, the failing side counting as invisible.
func (c *Collection) Judge(op Op, guard []byte, caller *Caller) (Op, bool, error) {
	if !c.HasGuard() {
		return op, true, nil
	}
	v := caller.view(c)
	if v == nil || !v.mayRead {
		return op, false, nil
	}
	j := c.filter.judgements.get(c.filter)
	defer c.filter.judgements.pool.Put(j)
	sides, err := j.parse(guard)
	if err != nil {
		return op, false, fmt.Errorf("collection %s: a change can't be judged: %w", c.Name, err)
	}
	if op == Upsert && sides&guardNew != 0 {
		var after bool
		if after, err = j.eval.run(j.new, caller.claims); after {
			return Upsert, true, nil
		}
	}
	before := false
	if sides&guardOld != 0 {
		var e error
		before, e = j.eval.run(j.old, caller.claims)
		err = firstError(err, e)
	}
	if err != nil {
		err = c.filterError(err)
	}
	if op == Upsert {
		op = Leave
	}
	return op, before, err
}

// JudgeKey returns the values of the claims that the collection's filter names: Judge gives the same answer to all
// callers with the same key.
func (c *Collection) JudgeKey(caller *Caller) string {
	if v := caller.view(c); v != nil {
		return v.judgeKey
	}
	return ""
}

func (j *judgement) parse(guard []byte) (sides byte, err error) {
	if len(guard) == 0 || guard[0]&^(guardNew|guardOld) != 0 {
		return 0, errGuard
	}
	sides, guard = guard[0], guard[1:]
	if sides&guardNew != 0 {
		if guard, err = parseSide(j.new, guard); err != nil {
			return 0, err
		}
	}
	if sides&guardOld != 0 {
		if guard, err = parseSide(j.old, guard); err != nil {
			return 0, err
		}
	}
	if len(guard) > 0 {
		return 0, errGuard
	}
	return sides, nil
}

func parseSide(row schema.Row, guard []byte) ([]byte, error) {
	for i := range row {
		size, n := binary.Uvarint(guard)
		if n <= 0 || size > uint64(len(guard)-n)+1 {
			return nil, errGuard
		}
		guard = guard[n:]
		if size == 0 {
			row[i] = nil
			continue
		}
		row[i], guard = guard[:size-1:size-1], guard[size-1:]
	}
	return guard, nil
}
