// Workflows of this pack in the order of their numbers: ComfyUI lists the files of packs as the disk gives them.

import { api } from "../../scripts/api.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));
const getWorkflowTemplates = api.getWorkflowTemplates;

api.getWorkflowTemplates = async function (...args) {
  const found = await getWorkflowTemplates.apply(this, args);
  found[PACK]?.sort((one, other) => one.localeCompare(other, "en", { numeric: true }));
  return found;
};
