package chaos

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	// frozenBeyond is longer than the server waits for a walsender's reader, and frozenLong than every lease and deadline by which
	// others notice that a gateway stands still, but for a connection to the log that says nothing.
	frozenBeyond = 7 * time.Second
	frozenLong   = 17 * time.Second
	// silentLong is longer than an instance waits for Redis, or for a server that says nothing on a replication connection.
	silentLong = 8 * time.Second
)

func failpoints(o Options, _ setup) bool  { return o.Failpoints }
func withRedis(_ Options, w setup) bool   { return w.redis }
func elsewhere(_ Options, w setup) bool   { return w.logElsewhere }
func withStandby(_ Options, w setup) bool { return w.standby }
func withBackup(_ Options, w setup) bool  { return w.backup }
func withClock(_ Options, w setup) bool   { return w.clock }
func madeForStandby(w setup) bool         { return w.standby }
func madeForBackup(w setup) bool          { return w.backup }
func madeForClock(w setup) bool           { return w.clock }
func logBackup(_ Options, w setup) bool   { return w.backup && w.logElsewhere }
func logClock(_ Options, w setup) bool    { return w.clock && w.logElsewhere }

// faults are all that can happen. docs/chaos.md says what each of them is.
var faults []fault

// The list is made at start, for what it names refers to it.
func init() {
	faults = []fault{
		{name: "leader killed", times: 3, do: (*run).killLeader},
		{name: "gateway killed", times: 2, do: (*run).killOne},
		{name: "gateway killed at a step", times: 4, needs: failpoints, takes: stepTakes, do: (*run).dieAtAStep},
		{name: "all gateways killed", times: 1, do: (*run).killAll},
		{name: "gateway stopped", times: 1, do: (*run).stopOne},
		{name: "rolling upgrade", times: 1, do: (*run).upgrade},
		{name: "gateway frozen", times: 2, do: (*run).freezeOne},
		{name: "leader frozen", times: 1, do: (*run).freezeLeader},
		{name: "leader frozen beyond its walsender", times: 1, lasts: frozenBeyond, do: (*run).freezeBeyond},
		{name: "leader frozen beyond every lease", times: 1, lasts: frozenLong, do: (*run).freezeLong},

		{name: "network cut", times: 4, do: (*run).cut},
		{name: "network down", times: 3, do: (*run).down},
		{name: "network stalled", times: 3, do: (*run).stall},
		{name: "network stalled for long", times: 2, lasts: silentLong, do: (*run).stallLong},
		{name: "network stalled one way", times: 2, do: (*run).stallOneWay},
		{name: "network stalled, then cut", times: 2, do: (*run).stallThenCut},
		{name: "network slow", times: 2, do: (*run).slow},
		{name: "gateway reaches the source only", times: 1, do: partition(false, true, true)},
		{name: "gateway reaches all but the source", times: 1, do: partition(true, false, false)},
		{name: "gateway reaches all but the log", times: 1, do: partition(false, true, false)},
		{name: "gateway reaches all but Redis", times: 1, needs: withRedis, do: partition(false, false, true)},
		{name: "all gateways lose Redis", times: 1, needs: withRedis, do: (*run).allLoseRedis},
		{name: "clients cut", times: 1, do: (*run).cutClients},
		{name: "clients dead", times: 2, do: (*run).strandClients},
		{name: "clients slow", times: 1, do: (*run).slowClients},
		{name: "application cut", times: 1, do: (*run).cutApplication},

		{name: "Redis emptied", times: 1, needs: withRedis, do: (*run).flushRedis},
		{name: "Redis restarted", times: 1, needs: withRedis, do: (*run).restartRedis},
		{name: "Redis away", times: 2, needs: withRedis, do: (*run).redisAway},
		{name: "Redis silent", times: 2, needs: withRedis, do: (*run).redisSilent},
		{name: "Redis silent for long", times: 2, needs: withRedis, lasts: silentLong, do: (*run).redisSilentLong},
		{name: "Redis' subscribers ended", times: 2, needs: withRedis, do: (*run).endSubscribers},

		{name: "source crashed", times: 2, do: (*run).crashSource},
		{name: "source restarted", times: 1, do: (*run).restartSource},
		{name: "log server crashed", times: 2, needs: elsewhere, do: (*run).crashLog},
		{name: "log server restarted", times: 1, needs: elsewhere, do: (*run).restartLog},
		{name: "walsender terminated", times: 2, do: (*run).endWalsender},
		{name: "gateways' backends terminated", times: 2, do: (*run).endBackends},
		{name: "standby promoted", times: 1, needs: withStandby, special: madeForStandby, do: (*run).promoteCaughtUp},
		{name: "standby promoted behind", times: 2, needs: withStandby, special: madeForStandby, do: (*run).promoteBehind},
		{name: "source restored from a backup", times: 1, needs: withBackup, special: madeForBackup, do: (*run).restoreSource},
		{name: "log restored from a backup", times: 1, needs: logBackup, special: madeForBackup, do: (*run).restoreLog},
		{name: "source's clock jumps", times: 3, needs: withClock, special: madeForClock, do: (*run).jumpSource},
		{name: "log's clock jumps", times: 2, needs: logClock, do: (*run).jumpLog},

		{name: "slot dropped", times: 1, do: (*run).dropSlot},
		{name: "slot invalidated", times: 1, do: (*run).invalidateSlot},
		{name: "log's disk full", times: 2, do: (*run).fillDisk},
		{name: "log partition dropped", times: 2, do: (*run).dropPartition},
	}
}

// between is a random duration from one on below another.
func between(rng *rand.Rand, from, to time.Duration) time.Duration { return from + upTo(rng, to-from) }

// exclusively runs what must have all the tokens, in their order, and does nothing once ctx has ended.
func exclusively(ctx context.Context, tokens []token, do func() (string, error)) (string, error) {
	for n, t := range tokens {
		if !t.take(ctx) {
			for _, taken := range tokens[:n] {
				taken.release()
			}
			return "", nil
		}
	}
	defer func() {
		for _, t := range tokens {
			t.release()
		}
	}()
	if ctx.Err() != nil {
		return "", nil
	}
	return do()
}

// holds are the tokens of all gateways.
func (r *run) holds() (all []token) {
	for _, i := range r.fleet {
		all = append(all, i.hold)
	}
	return all
}

// storageHold is the token of the server that the log is on.
func (r *run) storageHold() token {
	if r.setup.logElsewhere {
		return r.logHold
	}
	return r.sourceHold
}
