package schema

import (
	"strings"
	"testing"
)

func TestLoadCatalog(t *testing.T) {
	t.Parallel()
	_, conn := database(t, `CREATE SCHEMA "Ünï ""q"`,
		`CREATE TYPE mood AS ENUM ('sad', 'ok')`, `CREATE DOMAIN feeling AS mood NOT NULL`, `CREATE TYPE pair AS (a int, b mood)`,
		`CREATE TABLE "Ünï ""q"."Täble ""x" (b text, "A ""k" int, m mood, f feeling, p pair, ps pair[], g int GENERATED ALWAYS AS ("A ""k" + 1) STORED,
			gone int, d int DEFAULT 7, n numeric(10,2) NOT NULL, PRIMARY KEY ("A ""k", b))`,
		`ALTER TABLE "Ünï ""q"."Täble ""x" DROP gone`, `CREATE VIEW v AS SELECT 1 AS one`, `CREATE UNLOGGED TABLE u (id int)`, identityTables)
	c := loadTables(t, conn, `Ünï "q.Täble "x`, "public.v", "public.u", "public.parts", "public.missing")
	odd := c.Table(`Ünï "q`, `Täble "x`)
	if odd == nil || c.Table("public", "missing") != nil || len(c.Tables) != 4 {
		t.Fatalf("loaded %v", c.Tables)
	}
	var cols []string
	for _, col := range odd.Columns {
		cols = append(cols, col.Name+":"+col.Type.Name)
	}
	if got := strings.Join(cols, " "); got != `b:text A "k:integer m:public.mood f:public.feeling p:public.pair ps:public.pair[] g:integer d:integer n:numeric` {
		t.Errorf("columns %s", got)
	}
	if len(odd.Key) != 2 || odd.Columns[odd.Key[0]].Name != `A "k` || odd.Columns[odd.Key[1]].Name != "b" {
		t.Errorf("key %v is not in key order", odd.Key)
	}
	at := func(name string) Column { return odd.Columns[odd.Column(name)] }
	if !at("g").Generated || at("d").Num != 9 || !at("d").HasDefault || !at("n").NotNull || at("m").NotNull || at("n").Toastable == at("d").Toastable {
		t.Errorf("columns %+v", odd.Columns)
	}
	if f := at("f").Type; f.Base == nil || f.Underlying().Labels[1] != "ok" || len(at("p").Type.Fields) != 2 || at("ps").Type.Elem != at("p").Type {
		t.Errorf("types %+v %+v", at("f").Type, at("ps").Type)
	}
	if v, u := c.Table("public", "v"), c.Table("public", "u"); v.Kind != 'v' || u.Persistence != 'u' || len(u.Key) != 0 {
		t.Errorf("view %+v, unlogged %+v", v, u)
	}
	if p := c.Table("public", "parts"); p.Kind != 'p' || len(p.Leaves) != 2 || p.Leaves[0].Name != "parts_1" || p.Leaves[1].Identity != 'n' {
		t.Errorf("partitions %+v", p)
	}
	if !strings.Contains(strings.Join(c.Names, " "), "public.by_index") || strings.Contains(strings.Join(c.Names, " "), "parts_1") {
		t.Errorf("names %v", c.Names)
	}
}

func TestKeepsShape(t *testing.T) {
	t.Parallel()
	const before = `CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TYPE pair AS (a int, b text); CREATE DOMAIN posint AS int; CREATE DOMAIN filled AS int DEFAULT 5;
		CREATE TABLE t (id int PRIMARY KEY, v varchar(20), m mood, p pair, gen int GENERATED ALWAYS AS (1) STORED)`
	for sql, keeps := range map[string]bool{
		`SELECT 1`:                true,
		`ALTER TABLE t ADD n int`: true,
		`ALTER TABLE t ADD n int NOT NULL DEFAULT 1`:                                       false,
		`ALTER TABLE t ADD n int DEFAULT 1`:                                                false,
		`ALTER TABLE t ADD n filled`:                                                       false,
		`ALTER TABLE t ADD n int GENERATED ALWAYS AS IDENTITY`:                             false,
		`ALTER TABLE t ADD n int GENERATED ALWAYS AS (2) STORED`:                           true,
		`ALTER TABLE t DROP gen`:                                                           true,
		`ALTER TABLE t DROP v`:                                                             false,
		`ALTER TABLE t RENAME v TO w`:                                                      false,
		`ALTER TABLE t ALTER v TYPE varchar(30)`:                                           false,
		`ALTER TABLE t ALTER v TYPE text`:                                                  false,
		`ALTER TABLE t ALTER v SET NOT NULL`:                                               true,
		`ALTER TABLE t ALTER v SET DEFAULT 'x'`:                                            true,
		`ALTER TYPE mood ADD VALUE 'new'`:                                                  true,
		`ALTER TYPE mood RENAME VALUE 'ok' TO 'fine'`:                                      false,
		`ALTER TYPE pair RENAME ATTRIBUTE a TO z`:                                          false,
		`ALTER TYPE pair ADD ATTRIBUTE c int`:                                              false,
		`ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (id, v)`:                    false,
		`ALTER TABLE t RENAME TO t2; ALTER TABLE t2 RENAME TO t`:                           true,
		`DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v varchar(20), m mood, p pair)`: false,
		`CREATE TYPE late AS (x int); ALTER TABLE t ADD l late`:                            true,
		`ALTER TABLE t ADD l int, ADD l2 int DEFAULT 3`:                                    false,
		`ALTER TABLE t ADD n int DEFAULT 1; ALTER TABLE t DROP n`:                          false,
		`ALTER TABLE t ADD n int; ALTER TABLE t ADD o int; ALTER TABLE t DROP n`:           false,
	} {
		t.Run(sql, func(t *testing.T) {
			t.Parallel()
			_, conn := database(t, before)
			stored := loadTables(t, conn, "public.t").Tables[0].Shape()
			mustExec(t, conn, sql)
			now := loadTables(t, conn, "public.t").Tables[0]
			if now.KeepsShape(stored) != keeps {
				t.Errorf("keeps: %v, want %v\nbefore:\n%s\nnow:\n%s", !keeps, keeps, stored, now.Shape())
			}
			if !now.KeepsShape(now.Shape()) {
				t.Error("a shape doesn't keep itself")
			}
		})
	}
}
