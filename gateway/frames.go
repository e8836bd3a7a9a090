package gateway

import (
	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

// frames holds what is made once per row change: its encodings and its judgements by distinct projection of claims.
type frames struct {
	memory  *budget
	name    string
	history string
	mark    *mark    // of the present transaction
	made    [3]frame // upsert, delete, leave
	marked  [3]frame // the same for the client whose push it is
	judged  map[string]judgement
}

type judgement struct {
	op   policies.Op
	seen bool
}

func (f *frames) reset(group []changelog.Entry, head *changelog.Head, m *mark) {
	f.release()
	f.name, f.history, f.mark = "", head.History, m
	clear(f.judged)
	if st := head.Collection(group[0].Collection); st != nil {
		f.name = st.Name
	}
}

// judge evaluates a filter once per distinct projection of claims.
func (f *frames) judge(s *subscriber, e *changelog.Entry, failed func(string, error)) (policies.Op, bool) {
	if len(e.Guard) == 0 {
		return policies.Op(e.Op), true
	}
	c := s.feed.collection(f.name)
	if c == nil {
		return 0, false
	}
	key := string(rune(e.Op)) + string(e.Guard) + "\x00" + c.JudgeKey(s.feed.caller) // entering and staying have guards of their own
	if j, ok := f.judged[key]; ok {
		return j.op, j.seen
	}
	op, seen, err := c.Judge(policies.Op(e.Op), e.Guard, s.feed.caller)
	if err != nil {
		failed(c.Name, err)
	}
	if f.judged == nil {
		f.judged = map[string]judgement{}
	}
	f.judged[key] = judgement{op, seen}
	return op, seen
}

// release gives up the hub's part in the frames made; the queues have theirs.
func (f *frames) release() {
	releaseAll(f.made[:])
	if f.mark != nil {
		releaseAll(f.marked[:])
	}
}

// encoded returns the change's frame for a subscriber, without room where the budget has none: the same one for everybody but
// the client whose push it is.
func (f *frames) encoded(s *subscriber, e *changelog.Entry, op policies.Op) frame {
	set, mine := &f.made, own{}
	if f.mark != nil && s.client == f.mark.client {
		set, mine = &f.marked, f.mark.own(f.name, e.DocID)
	}
	at := &set[0]
	switch op {
	case policies.Delete:
		at = &set[1]
	case policies.Leave:
		at = &set[2]
	}
	if at.data == nil {
		at.data = appendChange(make([]byte, 0, len(e.Data)+256), f.name, e, op, f.history, mine)
		at.kind, at.room = frameChange, f.memory.hold(len(at.data))
	}
	return *at
}
