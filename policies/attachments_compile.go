package policies

import (
	"regexp"
	"slices"
	"strconv"

	"github.com/walgate/walgate/schema"
)

func (k *compiler) compileAttachments() {
	specs := k.c.Spec.Attachments
	if specs != nil && len(specs) == 0 {
		k.fault("attachments", "an empty list", "at least one {column: NAME}", "leave attachments out if rows name none")
	}
	for i, spec := range specs {
		if a, ok := k.attachment("attachments."+strconv.Itoa(i), spec); ok {
			k.c.attachments = append(k.c.attachments, a)
		}
	}
	slices.SortFunc(k.c.attachments, func(a, b attachment) int { return compareSpecs(a.spec, b.spec) })
	k.c.attachments = slices.CompactFunc(k.c.attachments, func(a, b attachment) bool { return a.spec == b.spec })
	if len(specs) > 0 && k.c.HasGuard() {
		k.fault("where", "claims, in a collection with attachments", "a where over row alone",
			"say it with scope, which decides whose files these are: a where over claims is judged caller by caller")
	}
}

// attachment checks one place that names attachments.
func (k *compiler) attachment(path string, spec AttachmentSpec) (attachment, bool) {
	faults := len(k.faults)
	a := attachment{spec: spec}
	if spec.Path != "" && spec.Pattern != "" {
		k.fault(path, "path and pattern", "one of them", "write two entries, if ids are in both")
	}
	if spec.Path != "" {
		var err error
		if a.path, err = parsePath(spec.Path); err != nil {
			hint := err.Error()
			if near, err := parsePath("$." + spec.Path); err == nil && len(near) > 0 {
				hint = "did you mean $." + spec.Path + "?"
			}
			k.fault(path+".path", spec.Path, wantPath, hint)
		}
		a.spec.Path = a.path.String()
	}
	if spec.Pattern != "" {
		var err error
		if a.pattern, err = regexp.Compile(spec.Pattern); err != nil {
			k.fault(path+".pattern", spec.Pattern, "a regular expression in RE2's syntax, every match of which is an id", err.Error())
		}
	}
	t := k.c.Table
	a.table = t.Column(spec.Column)
	switch {
	case spec.Column == "":
		k.fault(path+".column", "nothing", "a column of "+t.String(), "")
	case a.table < 0:
		k.fault(path+".column", spec.Column, "a column of "+t.String(), didYouMean(spec.Column, k.names))
	case t.Columns[a.table].Generated:
		k.fault(path+".column", spec.Column+", a generated column", "an ordinary column", "logical replication does not carry generated columns")
	case k.c.exclude[spec.Column]:
		k.fault(path+".column", spec.Column+", an excluded column", "a column that documents have", "clients would be told ids that columns.exclude keeps from them")
	default:
		a.typ = t.Columns[a.table].Type.Underlying()
		k.checkAttachmentType(path, spec, t.Columns[a.table].Type)
	}
	return a, len(k.faults) == faults
}

// checkAttachmentType holds the column's type against what is looked for in it.
func (k *compiler) checkAttachmentType(path string, spec AttachmentSpec, typ *schema.Type) {
	got, json := spec.Column+", a "+typ.Name, typ.Underlying().Kind == schema.KindJSON
	switch {
	case spec.Path != "" && !json:
		k.fault(path+".column", got, "a json or jsonb column", "leave path out where the column itself is the id or a list of ids")
	case spec.Pattern != "" && !json && !isText(typ):
		k.fault(path+".column", got, "a json, jsonb, text or varchar column", "leave pattern out where the column itself is the id or a list of ids")
	case spec.Path == "" && spec.Pattern == "" && json:
		k.fault(path, got+", without a path", "path: "+wantPath, "or a pattern, whose every match in its strings is an id")
	case spec.Path == "" && spec.Pattern == "" && !json && !isID(typ) && (typ.Underlying().Kind != schema.KindArray || !isID(typ.Underlying().Elem)):
		k.fault(path+".column", got, "a column of type text, varchar, uuid, int2, int4 or int8, or an array of these, or json or jsonb with a path", "")
	}
}

func isText(t *schema.Type) bool {
	oid := t.Underlying().OID
	return oid == oidText || oid == oidVarchar
}

// isID says whether values of the type are ids as their texts are.
func isID(t *schema.Type) bool {
	switch t.Underlying().OID {
	case oidUUID, oidInt2, oidInt4, oidInt8:
		return true
	}
	return isText(t)
}
