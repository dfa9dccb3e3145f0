/** What JSON can hold. */

/** A value of `google.protobuf.Value`, such as a field's default in the form. */
export type JsonValue = null | boolean | number | string | JsonValue[] | { [key: string]: JsonValue };
