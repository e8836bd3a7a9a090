package schema

// builtin holds the types that every PostgreSQL has under the same OID and whose JSON is not simply their text, with
// the commonest ones that are, and the arrays of all of them. Others are loaded like any type of the application.
var builtin = func() map[uint32]*Type {
	known := map[uint32]*Type{}
	for _, b := range []struct {
		oid, array uint32
		name       string
		kind       Kind
	}{
		{16, 1000, "boolean", KindBool},
		{17, 1001, "bytea", KindText},
		{18, 1002, `"char"`, KindText},
		{19, 1003, "name", KindText},
		{20, 1016, "bigint", KindBigNumber},
		{21, 1005, "smallint", KindNumber},
		{23, 1007, "integer", KindNumber},
		{25, 1009, "text", KindText},
		{26, 1028, "oid", KindText},
		{114, 199, "json", KindJSON},
		{650, 651, "cidr", KindText},
		{700, 1021, "real", KindNumber},
		{701, 1022, "double precision", KindNumber},
		{790, 791, "money", KindText},
		{869, 1041, "inet", KindText},
		{1042, 1014, "bpchar", KindText},
		{1043, 1015, "character varying", KindText},
		{1082, 1182, "date", KindDate},
		{1083, 1183, "time without time zone", KindText},
		{1114, 1115, "timestamp without time zone", KindTimestamp},
		{1184, 1185, "timestamp with time zone", KindTimestampTZ},
		{1186, 1187, "interval", KindText},
		{1266, 1270, "time with time zone", KindText},
		{1560, 1561, `"bit"`, KindText},
		{1562, 1563, "bit varying", KindText},
		{1700, 1231, "numeric", KindBigNumber},
		{2950, 2951, "uuid", KindText},
		{3802, 3807, "jsonb", KindJSON},
	} {
		t := &Type{OID: b.oid, Name: b.name, Kind: b.kind}
		known[b.oid] = t
		known[b.array] = arrayOf(b.array, t)
	}
	for _, v := range []struct {
		oid, array, elem uint32
		name             string
	}{
		{22, 1006, 21, "int2vector"},
		{30, 1013, 26, "oidvector"},
	} {
		t := &Type{OID: v.oid, Name: v.name, Kind: KindVector, Elem: known[v.elem]}
		known[v.oid] = t
		known[v.array] = arrayOf(v.array, t)
	}
	return known
}()

func arrayOf(oid uint32, elem *Type) *Type {
	return &Type{OID: oid, Name: elem.Name + "[]", Kind: KindArray, Elem: elem, Delim: ','}
}
