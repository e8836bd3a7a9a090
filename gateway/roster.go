package gateway

// roster lists the subscribers of each scope, of rows or of files. Each subscriber knows its place in its scopes' lists, so that leaving
// costs its own scopes, however many others there are.
type roster struct {
	seats func(*subscriber) (keys [][16]byte, slots []int)
}

var (
	rowRoster  = roster{func(s *subscriber) ([][16]byte, []int) { return s.feed.scopes, s.slots }}
	fileRoster = roster{func(s *subscriber) ([][16]byte, []int) { return s.feed.files.scopes(), s.fileSlots }}
)

// add appends s to the lists of its scopes and returns its places there.
func (r roster) add(lists map[[16]byte][]*subscriber, s *subscriber) (slots []int) {
	keys, _ := r.seats(s)
	slots = make([]int, len(keys))
	for i, key := range keys {
		slots[i] = len(lists[key])
		lists[key] = append(lists[key], s)
	}
	return slots
}

// remove takes s out: whoever is last in a list takes its place.
func (r roster) remove(lists map[[16]byte][]*subscriber, s *subscriber) {
	keys, slots := r.seats(s)
	for i, key := range keys {
		list := lists[key]
		last := len(list) - 1
		moved := list[last]
		list[slots[i]] = moved
		movedKeys, movedSlots := r.seats(moved)
		for j, k := range movedKeys {
			if k == key {
				movedSlots[j] = slots[i]
			}
		}
		list[last] = nil
		if lists[key] = list[:last]; last == 0 {
			delete(lists, key)
		}
	}
}
